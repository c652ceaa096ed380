"""Spreads a model over several devices: whole layers, in their order, about as many bytes each.

accelerate decides which module goes where, and moves what one layer hands to the next. Reads no
tensor; knows nothing of recipes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Place = int | str
"""A CUDA device by its number, as accelerate wants it; any other by its name."""


def spread(model: Any, devices: Sequence[str], dtype: torch.dtype | None) -> dict[str, Place]:
    """The device of every module of a model without memory, for transformers' `device_map`.

    What may not be torn apart (a layer, tied weights) stays together. The first device holds the
    embedding: inputs go there, and logits come back to it.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    model.tie_weights()
    whole = list(model._no_split_modules or ())
    sizes: Mapping[str, int] = compute_module_sizes(model, dtype=dtype)
    layer = max(
        (sizes[name] for name, module in model.named_modules() if type(module).__name__ in whole),
        default=0,
    )
    # accelerate fills one device after another, and keeps room for a layer on the first
    share = -(-sizes[""] // len(devices))
    limits = {number: share + layer // 2 for number in range(len(devices))}
    limits[0] += layer
    limits[len(devices) - 1] = 2 * sizes[""]
    placed = infer_auto_device_map(
        model, max_memory=limits, no_split_module_classes=whole, dtype=dtype
    )
    return {name: _place(devices[number]) for name, number in placed.items()}


def _place(device: str) -> Place:
    kind, _, number = device.partition(":")
    return int(number) if kind == "cuda" and number else device
