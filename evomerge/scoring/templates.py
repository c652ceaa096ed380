"""A sandboxed, caching Jinja environment for lm-eval's prompt templates.

lm-eval compiles a template again for every item and lets it call anything: a task file without
any `!function` could run code. Knows nothing of tasks; puts the environment into lm-eval once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment


class CachingSandbox(SandboxedEnvironment):
    """A SandboxedEnvironment that compiles each template once."""

    def __init__(self, like: jinja2.Environment) -> None:
        super().__init__(
            loader=like.loader,
            undefined=like.undefined,
            keep_trailing_newline=like.keep_trailing_newline,
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            autoescape=like.autoescape,
        )
        self.filters.update(like.filters)
        self._compiled = lru_cache(maxsize=1024)(super().from_string)

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> jinja2.Template:
        if args or kwargs or not isinstance(source, str):
            return super().from_string(source, *args, **kwargs)
        return self._compiled(source)


def sandbox_templates() -> None:
    """Make lm-eval render prompts in the sandbox. Calling it again changes nothing."""
    from lm_eval import utils

    if not isinstance(utils.env, CachingSandbox):
        utils.env = CachingSandbox(utils.env)
