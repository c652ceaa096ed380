"""The fit of RegMean and MaTS: inner products of what each linear layer is given, for each source.

Knows nothing of the least squares that are solved with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from evomerge.errors import MergeError
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch, merged_names
from evomerge.merging.fitted.calibration import Batch, Example, batch
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.gram import gram_key, packed

_RECENT = 3
"""Inputs that are kept to be told again: between a block's attention and an mlp beside it, which
are given the same, lie those of the attention."""


class GramSettings(Settings):
    """`batch_size` is the most examples in a forward pass. Only examples of one length go together,
    so that nothing is padded and every row that a layer is given is a token's."""

    batch_size: int = Field(default=16, ge=1)


class GramFit(Fitter):
    """Gᵢ = XᵀX / n of the n rows that a linear layer of source i is given on source i's data.

    A layer is an `nn.Linear`, or a Conv1D of GPT-2, that has a stored tensor to itself; not a tied
    head, nor fused experts. Layers that are given the same rows share one matrix. Products are
    computed in float32 and summed over batches in float64, so that an entry G[j, k] is off by about
    1e-7·√(G[j, j]·G[k, k]). Memory: one source's matrices in float64 beside one live model.
    Artifact: for each source and input the upper triangle, float32; facts `inputs`, for each source
    the input of each layer, and `inputs_first`, the layers that are stored as [in, out].

    Source: Jin et al. 2023, arXiv:2212.09849. Every token counts; nothing is padded.
    """

    name = "gram"
    summary = "inner products of the inputs of every linear layer, for each source"
    settings = GramSettings

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        chosen = {name: problem.calibration.of(name) for name in problem.sources}
        network = Network(problem.anchor, device=problem.device)
        layers = linear_layers(network)
        done, total = 0, sum(map(len, chosen.values()))
        for source, examples in chosen.items():
            if source not in draft.kept:
                network.become(problem.sources[source], merged_names(problem))
                grams = Grams(network, layers)
                for number, part in enumerate(even_batches(examples, settings.batch_size), 1):
                    grams.add(part)
                    watch.progress(min(done + number * settings.batch_size, total), total)
                tensors = {gram_key(source, name): packed(g) for name, g in grams.means(source)}
                draft.keep(source, tensors, {"inputs": grams.inputs}, flops=network.flops)
            done += len(examples)
            watch.progress(done, total)
        facts = {
            "inputs": {source: draft.kept[source]["inputs"] for source in sorted(chosen)},
            "inputs_first": sorted(n for n, m in layers.items() if not isinstance(m, nn.Linear)),
        }
        draft.finish({}, facts, flops=network.flops)


def linear_layers(network: Network) -> dict[str, nn.Module]:
    """The layers x·Wᵀ or x·W whose W is a stored tensor that nothing else computes with."""
    from transformers.pytorch_utils import Conv1D

    users: dict[int, int] = {}
    for module in network.model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    found: dict[str, nn.Module] = {}
    for name in network.learned:
        _, module = network.module(name) or ("", None)
        weight = getattr(module, "weight", None)
        is_weight = isinstance(weight, nn.Parameter) and weight.shape == network.shape(name)
        if not is_weight or not network.parts[name][0].is_run or users[id(weight)] > 1:
            continue
        assert module is not None
        if type(module) in (nn.Linear, Conv1D) or _is_linear(module):
            found[name] = module
    if not found:
        raise MergeError(
            f"{type(network.model).__name__}: has no linear layer with a stored tensor to itself,"
            " so there is nothing to fit; take the average (`linear`)"
        )
    return found


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a subclass of `nn.Linear` still computes x·Wᵀ + b, and nothing else."""
    if not isinstance(module, nn.Linear):
        return False
    rows = torch.linspace(-1, 1, module.in_features, device=module.weight.device)[None]
    try:
        found = module(rows)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # it asks for more than rows
    wanted = nn.functional.linear(rows, module.weight, module.bias)
    return isinstance(found, Tensor) and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def even_batches(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """The examples, at most `size` of one length at a time, the short ones first."""
    for _, alike in groupby(sorted(examples, key=_length), key=_length):
        rows = list(alike)
        for start in range(0, len(rows), size):
            yield batch(rows[start : start + size])


def _length(example: Example) -> int:
    return len(example.tokens)


class Grams:
    """Sums XᵀX while batches run through a network.

    `inputs` maps each layer that was reached to the layer whose matrix it shares: the first one
    that was given the same rows, decided when it is reached for the first time.
    """

    def __init__(self, network: Network, layers: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, str] = {}
        self._network = network
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._recent: deque[tuple[str, Tensor, int]] = deque(maxlen=_RECENT)

    @torch.no_grad()
    def add(self, examples: Batch) -> None:
        """Run a batch, which must hold no padding."""
        with self._watched():
            self._network.logits(examples)

    def means(self, source: str) -> Iterator[tuple[str, Tensor]]:
        """Each matrix [d, d] float64, by the layer it belongs to; each can be had once.

        Raises MergeError where the activations were NaN or infinite.
        """
        for name in sorted(self._sums):
            mean = self._sums.pop(name) / self._counts[name]
            if not bool(mean.isfinite().all()):
                raise MergeError(
                    f"{source}: the input of {name} is NaN or infinite on its calibration data"
                )
            yield name, mean

    @contextmanager
    def _watched(self) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(partial(self._take, name))
            for name, module in self._layers.items()
        ]
        try:
            yield
        finally:
            self._recent.clear()
            for hook in hooks:
                hook.remove()

    def _take(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (rows,) = inputs
        state = rows._version  # counts writes in place
        given = next((n for n, x, s in self._recent if x is rows and s == state), name)
        shared = self.inputs.setdefault(name, given)
        if shared == name:
            self._recent.append((name, rows, state))
            self._sum(name, rows.detach().reshape(-1, rows.shape[-1]).float())
        elif shared != given:
            raise MergeError(f"{name}: is given what {shared} is given, but not in every batch")

    def _sum(self, name: str, rows: Tensor) -> None:
        size = rows.shape[1]
        if name not in self._sums:
            self._sums[name] = rows.new_zeros(size, size, dtype=torch.float64)
            self._counts[name] = 0
        self._sums[name] += rows.T @ rows
        self._counts[name] += len(rows)
        self._network.flops += 2.0 * len(rows) * size**2
