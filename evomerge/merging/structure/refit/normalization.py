"""What merging does to the statistics of activations, set right on data: BatchNorm and REPAIR.

The mean of two networks has units that vary less than those of either, even where the networks were
brought into one order first. Batch norms are told the new statistics; where there are none, layers
are rescaled to the statistics of the parents. Knows any torch module, and no checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evomerge.errors import MergeError
from evomerge.merging.structure.refit.activation_moments import (
    Moments,
    in_eval_mode,
    inputs_of,
    measured,
    outputs_of,
    run,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


def reset_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of batch norms to those of their inputs on the data, in place.

        μ = Σ x / n,   σ² = Σ (x − μ)² / (n − 1)       over the n values of a channel in all batches

    A batch is a tensor, or the arguments of a forward pass as a tuple or by name. Batch norms run
    in train mode: each normalises a batch by the statistics of that batch, as its layers before it
    do. Everything else runs in eval mode; all modes are restored. Sums in float64.

    With all data in one batch it is what torch computes with momentum=None. Over several batches,
    torch averages the batches' variances, which misses the variance between batches and counts a
    smaller last one in full; here all values are pooled, so that batch size matters only through
    the normalisation of what comes before. Doing it twice is doing it once.

    Raises UserError without data, or where a batch has one value of a channel; NonFiniteModel for
    statistics that are NaN or infinite, and then leaves all as they were. A network without batch
    norms is left as it is.

    Source: Jordan et al. 2023, arXiv:2211.08403; Izmailov et al. 2018, arXiv:1803.05407.
    """
    norms = _norms(model)
    with in_eval_mode(model), _by_batch(norms.values()):
        found, count = measured(model, norms, batches, inputs_of)
    for name, moments in found.items():
        norm: Any = norms[name]
        norm.running_mean.copy_(moments.mean)
        norm.running_var.copy_(moments.squares / (moments.n - 1))
        norm.num_batches_tracked.fill_(count)


def repair(
    model: nn.Module,
    parents: Sequence[nn.Module],
    batches: Sequence[Any],
    weights: Sequence[float],
    *,
    layers: Sequence[str] | None = None,
) -> None:
    """Rescale the layers of a merged network to the activations of its parents, in place.

        W_u ← W_u · s*/s_u,   b_u ← (b_u − μ_u) · s*/s_u + μ*,   μ* = Σᵢ wᵢ μᵢ,   s* = Σᵢ wᵢ sᵢ

    with μ, s the mean and standard deviation of a channel of the layer's outputs over all data. The
    layers (linear layers and convolutions) are taken in the order in which they run, each with the
    statistics that it has when all before it are repaired: one pass over the data for each layer.
    Without `layers` they are all but the last that runs, whose outputs are no hidden units.
    Parents are to lie in one order already. Batches as in `reset_batch_norm`; everything runs in
    eval mode; all modes are restored. Layers without a bias get one. Sums in float64.

    A channel that never changes keeps its weights and gets the mean. With LayerNorm or RMSNorm
    behind the layers there is little for it to do.

    Raises MergeError for a network with batch norms (see `reset_batch_norm`), for parents that are
    not of its shapes, for layers that run more than once or share their weights; UserError without
    data; NonFiniteModel where activations are NaN or infinite.

    Source: Jordan et al. 2023, arXiv:2211.08403. Their code lets every layer normalise each
    batch by that batch and averages over batches; this has no part that depends on batch size.
    """
    _check_parents(model, parents, weights)
    with in_eval_mode(model):
        chosen = _chosen(model, batches, layers)
        goals = _goals(parents, list(chosen), batches, weights)
        for name, layer in chosen.items():
            found, _ = measured(model, {name: layer}, batches, outputs_of)
            _rescale(layer, found[name], *goals[name])


@contextmanager
def _by_batch(norms: Collection[_BatchNorm]) -> Iterator[None]:
    """Batch norms go by each batch, and keep nothing of it."""
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _chosen(
    model: nn.Module, batches: Sequence[Any], layers: Sequence[str] | None
) -> dict[str, nn.Module]:
    """The layers to be repaired, in the order in which they run."""
    known = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    ran: list[str] = []
    with ExitStack() as stack, torch.no_grad():
        for name, module in known.items():
            note = partial(_note, ran, name)
            stack.callback(module.register_forward_pre_hook(note).remove)
        run(model, batches[:1])
    chosen = ran[:-1] if layers is None else list(layers)
    if odd := next((name for name in chosen if ran.count(name) != 1), None):
        raise MergeError(
            f"{odd}: runs {ran.count(odd)} times in a forward pass; only a linear layer or"
            " convolution that runs once can be rescaled to its parents' activations: name `layers`"
        )
    tensors = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    if tied := next((name for name in chosen if tensors[id(known[name].weight)] > 1), None):
        raise MergeError(
            f"{tied}.weight: is shared with another layer, which rescaling it would change; leave"
            " it out of `layers`"
        )
    return {name: known[name] for name in ran if name in chosen}


def _note(ran: list[str], name: str, *_: object) -> None:
    ran.append(name)


def _check_parents(
    model: nn.Module, parents: Sequence[nn.Module], weights: Sequence[float]
) -> None:
    if norms := _norms(model):
        raise MergeError(
            f"{next(iter(norms))}: a network with batch norms is set right by reset_batch_norm, not"
            " by repair"
        )
    if len(parents) != len(weights) or not parents:
        raise MergeError(f"{len(parents)} parents with {len(weights)} weights; give each one")
    for name, layer in model.named_modules():
        for number, parent in enumerate(parents if isinstance(layer, _LAYERS) else ()):
            found, wanted = _weight_shape(parent, name), _weight_shape(model, name)
            if found != wanted:
                raise MergeError(
                    f"{name}.weight: is {wanted} in the merged network and {found} in parent"
                    f" {number}; repair needs networks of the same layers"
                )


def _weight_shape(model: nn.Module, layer: str) -> list[int] | None:
    found = model.state_dict().get(f"{layer}.weight")
    return list(found.shape) if found is not None else None


def _goals(
    parents: Sequence[nn.Module],
    names: Sequence[str],
    batches: Sequence[Any],
    weights: Sequence[float],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation [c] that each layer is to have."""
    goals: dict[str, tuple[Tensor, Tensor]] = {}
    for parent, weight in zip(parents, weights, strict=True):
        modules = {name: parent.get_submodule(name) for name in names}
        with in_eval_mode(parent):
            found, _ = measured(parent, modules, batches, outputs_of)
        for name in names:
            mean, spread = found[name].mean * weight, found[name].spread * weight
            before = goals.get(name, (torch.zeros_like(mean), torch.zeros_like(spread)))
            goals[name] = before[0] + mean, before[1] + spread
    return goals


def _rescale(layer: Any, found: Moments, mean: Tensor, spread: Tensor) -> None:
    """Give the layer's outputs this mean and standard deviation [c]."""
    scale = torch.where(found.spread > 0, spread / found.spread, 1.0)
    old = layer.bias.double() if layer.bias is not None else torch.zeros_like(mean)
    bias = (old - found.mean) * scale + mean
    with torch.no_grad():
        layer.weight.copy_(_scaled(layer, scale))
        if layer.bias is None:
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        else:
            layer.bias.copy_(bias)


def _scaled(layer: nn.Module, scale: Tensor) -> Tensor:
    """The layer's weight with every output multiplied by its scale [c]."""
    weight = cast(Tensor, layer.weight).double()
    rest = [1] * (weight.dim() - 2)
    if not isinstance(layer, _TRANSPOSED):
        return weight * scale.view(-1, 1, *rest)
    apart = weight.view(layer.groups, -1, *weight.shape[1:])  # inputs, outputs of a group, ...
    return (apart * scale.view(layer.groups, 1, -1, *rest)).view_as(weight)
