"""The chat template of a merged model: how a conversation is written as one text.

Reads the models' templates, knows a few public formats by name, and writes where transformers
looks. A template is only parsed here, never run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evomerge.checkpoints.tokenizer_files import read_json, write_json
from evomerge.checkpoints.weights import Model
from evomerge.errors import CheckpointError, SpecError
from evomerge.spec import nearest

AUTO = "auto"
_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_OLD_FILE = "chat_template.json"

# Pieces are joined so that the lines of the source are not lines of the text.
_ALPACA = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{ message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- if loop.first -%}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately"
    " completes the request.\\n\\n' }}"
    "{%- endif -%}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)
_CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_EXAONE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}"
    "{{ '[|system|][|endofturn|]\\n' }}"
    "{%- endif -%}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}"
)
_LLAMA3 = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif -%}"
)
_MISTRAL = (
    "{{- bos_token -}}"
    "{%- set spoken = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set spoken.system = message['content'] + '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ ' [INST] ' + spoken.system + message['content'] + ' [/INST]' }}"
    "{%- set spoken.system = '' -%}"
    "{%- else -%}"
    "{{ ' ' + message['content'] + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Formats by name, from the descriptions that their makers publish."""


def chat_template(choice: str, models: Sequence[Model]) -> str | None:
    """The template for `choice`: auto, a name of TEMPLATES, or the text of a template.

    `auto` is the template that most of the models with one have, of equals the first; None if no
    model has one. Raises SpecError for an unknown name or a text that is no template.
    """
    if choice == AUTO:
        found = [text for model in models if (text := template_of(model))]
        return Counter(found).most_common(1)[0][0] if found else None
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    if problem := check_chat_template(choice):
        raise SpecError("recipe", [problem])
    return choice


def check_chat_template(choice: str) -> str | None:
    """What is wrong with a choice, without any model; None if nothing is."""
    if choice == AUTO or choice in TEMPLATES:
        return None
    if "{" not in choice:
        return f"chat_template: unknown {choice!r}{nearest(choice, [AUTO, *TEMPLATES])}"
    try:
        ImmutableSandboxedEnvironment(extensions=[LoopControlExtension, _Generation]).parse(choice)
    except TemplateSyntaxError as error:
        return f"chat_template: line {error.lineno} is not Jinja: {error.message}"
    return None


class _Generation(Extension):
    """transformers' own tag, {% generation %}: what of a conversation the model says."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_of(model: Model) -> str | None:
    """A checkpoint's own chat template, its default one if it has several."""
    path = model.companion(_FILE)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
    for name in (_OLD_FILE, _CONFIG):
        found = read_json(model.companion(name)).get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if isinstance(found, str):
            return found
    return None


def write_chat_template(folder: Path, text: str) -> list[Path]:
    """Write a template into a checkpoint's folder, in place of what is there; returns
    the paths written.

    Raises OSError.
    """
    (folder / _OLD_FILE).unlink(missing_ok=True)
    config = read_json(folder / _CONFIG)
    written = [folder / _FILE]
    written[0].write_text(text, encoding="utf-8")
    if config.pop("chat_template", None) is not None:
        written.append(write_json(folder / _CONFIG, config))
    return written
