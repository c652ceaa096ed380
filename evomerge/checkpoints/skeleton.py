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
    with torch.device("meta"):
        return _constructed(model, otherwise)


def blank(model: Described, *, otherwise: str, dtype: torch.dtype | None, device: str) -> Any:
    """The model of `model.config` in memory, in evaluation mode, its weights not yet set.

    Raises as `skeleton` does.
    """
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        made = _constructed(model, otherwise, dtype=dtype)
    made.tie_weights()  # which was left out with their values
    return made.requires_grad_(False).eval()


def _constructed(model: Described, otherwise: str, **options: Any) -> Any:
    import transformers

    settings = {key: value for key, value in model.config.items() if key != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(model.config.get("model_type"), **settings)
        architecture = next(iter(model.config.get("architectures") or ()), "")
        known = getattr(transformers, architecture, None)
        if known is not None:
            return known._from_config(config, **options)
        return transformers.AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{model.path}: transformers does not know this architecture, so {otherwise}:"
            f" {str(error).splitlines()[0]}"
        ) from error
