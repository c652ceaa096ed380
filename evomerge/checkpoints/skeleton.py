"""A model without memory, as transformers builds it from a config: what its parts are called.

Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from evomerge.errors import CheckpointError


class Described(Protocol):
    """A model, or one to be: what the user calls it, and its config."""

    @property
    def path(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


def skeleton(model: Described, *, otherwise: str) -> Any:
    """The model of `model.config` on the meta device.

    Raises CheckpointError, with what cannot be done `otherwise`, for an architecture that
    transformers does not know.
    """
    import transformers

    settings = {key: value for key, value in model.config.items() if key != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(model.config.get("model_type"), **settings)
        architecture = next(iter(model.config.get("architectures") or ()), "")
        known = getattr(transformers, architecture, None)
        with torch.device("meta"):
            if known is not None:
                return known._from_config(config)
            return transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{model.path}: transformers does not know this architecture, so {otherwise}:"
            f" {str(error).splitlines()[0]}"
        ) from error
