"""Watch what a live model's routers send to its experts, by hooks on the experts.

Knows nothing of what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import MergeError
from evomerge.merging.fitted.calibration import Example, batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.layers import ExpertLayer

Take = Callable[[int, Tensor, Tensor, Tensor, nn.Module], None]
"""Is handed an expert layer's place, the inputs [n, d] of its real tokens, the experts [n, k] each
is sent to (−1 for none: beyond an expert's capacity), their gate values [n, k], and the live module
of its experts."""


def watch_routing(
    network: Network,
    layers: Sequence[ExpertLayer],
    examples: Sequence[Example],
    take: Take,
    *,
    batch_size: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Run the examples and hand what is routed in every layer to `take`, batch by batch."""
    real: dict[str, Tensor] = {}
    with _watched(network, layers, take, real):
        for number, part in enumerate(batches(examples, batch_size), 1):
            for side, values in network.inputs(part.to(network.device)).items():
                real[side] = values.reshape(-1).bool()
            network.logits(part)
            progress(min(number * batch_size, len(examples)), len(examples))


@contextmanager
def _watched(
    network: Network, layers: Sequence[ExpertLayer], take: Take, real: dict[str, Tensor]
) -> Iterator[None]:
    handles = [
        experts_module(network, layer).register_forward_pre_hook(
            partial(_routed, at, layer, take, real), with_kwargs=True
        )
        for at, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routed(
    at: int,
    layer: ExpertLayer,
    take: Take,
    real: dict[str, Tensor],
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> None:
    """transformers' experts are called with (hidden states, top-k indices, top-k gate values);
    those of Switch with indices as 0 and 1, [n, 1, E]."""
    rows, chosen, gates = (*args, *kwargs.values())[:3]
    rows = rows.reshape(-1, rows.shape[-1])
    if one_hot(chosen, layer.experts):
        chosen = torch.where(chosen.any(2), chosen.argmax(2), -1)
    mask = "decoder_attention_mask" if layer.in_decoder else "attention_mask"
    keep = real.get(mask, real["attention_mask"])
    if chosen.is_floating_point() or len(chosen) != len(rows) or len(rows) != len(keep):
        raise MergeError(
            f"{type(module).__name__}: its routing cannot be watched; transformers calls these"
            " experts in another way than those of Mixtral or Qwen"
        )
    take(at, rows[keep].float(), chosen[keep], gates[keep], module)


def one_hot(chosen: Tensor, experts: int) -> bool:
    """Whether experts are told by a 1 among `experts` numbers, as Switch's are."""
    return chosen.ndim == 3 and chosen.shape[2] == experts


def experts_module(network: Network, layer: ExpertLayer) -> nn.Module:
    """The live module that holds a layer's experts."""
    key = network.parts[layer.name(0, layer.roles[0])][0].key
    module: nn.Module = network.model.get_submodule(f"{key.rpartition('.experts.')[0]}.experts")
    return module
