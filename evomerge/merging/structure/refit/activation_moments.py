"""Mean and spread of what the layers of a network are given and make, over batches of data.

Statistics of channels are streamed; no activation is kept. Knows any torch module, and not what the
statistics are for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evomerge.errors import NonFiniteModel, UserError

_CONSTANT = 1e-12  # variance by mean square that rounding leaves of what never changes

Watch = Callable[[nn.Module, Callable[[Tensor], None]], RemovableHandle]
"""Has activations [n, c] of a module handed on whenever it runs."""


class Moments:
    """Count, mean and sum of squared deviations of each of c channels, batch by batch."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Take in activations [n, c]; the update of Chan et al. 1979, which does not cancel."""
        rows = rows.detach().double()
        n, mean = len(rows), rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.n == 0:
            self.n, self.mean, self.squares = n, mean, squares
            return
        apart, total = mean - self.mean, self.n + n
        self.mean = self.mean + apart * n / total
        self.squares = self.squares + squares + apart.square() * self.n * n / total
        self.n = total

    @property
    def spread(self) -> Tensor:
        """Standard deviation [c], 0 for what never changes."""
        variance = self.squares / self.n
        constant = variance <= _CONSTANT * (variance + self.mean.square())
        return torch.where(constant, 0.0, variance).sqrt()


def measured(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Any], watch: Watch
) -> tuple[dict[str, Moments], int]:
    """Of every module that runs, and how many batches there were."""
    found: dict[str, Moments] = defaultdict(Moments)
    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            add = partial(_add, found, name)
            stack.callback(watch(module, add).remove)
        count = run(model, batches)
    return found, count


def _add(found: dict[str, Moments], name: str, rows: Tensor) -> None:
    if len(rows) == 0 or not bool(rows.isfinite().all()):
        raise NonFiniteModel(f"{name}: its activations on this data are NaN, infinite or none")
    found[name].add(rows)


def run(model: nn.Module, batches: Iterable[Any]) -> int:
    """A forward pass for every batch: a tensor, or arguments as a tuple or by name. How many there
    were. Raises UserError for none."""
    count = 0
    for batch in batches:
        count += 1
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, tuple):
            model(*batch)
        else:
            model(batch)
    if count == 0:
        raise UserError("no batch to measure activations on; name more data")
    return count


def inputs_of(norm: nn.Module, add: Callable[[Tensor], None]) -> RemovableHandle:
    """Watch what a batch norm is given."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        rows = _rows(given[0], 1)
        if len(rows) < 2:
            raise UserError("a batch has one value of each channel of a batch norm; give larger"
                            " batches")  # fmt: skip
        add(rows)

    return norm.register_forward_pre_hook(hook)


def outputs_of(layer: nn.Module, add: Callable[[Tensor], None]) -> RemovableHandle:
    """Watch what a linear layer or a convolution makes."""

    def hook(_: nn.Module, __: tuple[Tensor, ...], made: Tensor) -> None:
        add(_rows(made, -1 if isinstance(layer, nn.Linear) else 1 - _unbatched(layer, made)))

    return layer.register_forward_hook(hook)


def _unbatched(layer: nn.Module, made: Tensor) -> bool:
    """Whether a convolution's outputs are of one example, with no dimension for the batch."""
    return made.dim() < cast(Tensor, layer.weight).dim()


def _rows(activations: Tensor, channel: int) -> Tensor:
    return activations.detach().movedim(channel, -1).flatten(0, -2)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then every module is in its own again."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
