"""A partial merge refit layer by layer, each on what the refit ones before it give.

It depends on which units stay apart, and looks at data, so that it is part of a fit. How a layer is
refit is `least_squares`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from evomerge.merging.fitted.base import Problem
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.pleas.live import Batches, in_order, watched, widened_network
from evomerge.merging.structure.pleas.model import Pair, PleasModel, Refitting, filled
from evomerge.merging.structure.refit.least_squares import Data, LeastSquaresSettings, Merged, refit


class SequentialSettings(BaseModel):
    """Units apart for `budget` by `allocation` (`uniform`, or the `programme`, which needs
    `worth`), refit with this `ridge`. `targets` says what a merged unit is to give: of `both`
    models the mean, or on a source's data its `own`; data that is meant for both is nobody's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    budget: float = Field(default=1.2, ge=1.0, le=2.0)
    allocation: Literal["programme", "uniform"] = "programme"
    ridge: float = Field(default=1e-2, ge=0.0)
    targets: Literal["both", "own"] = "both"


def refit_in_turn(
    pair: Pair,
    apart: Mapping[str, int],
    problem: Problem,
    settings: SequentialSettings,
    orders: Mapping[str, Tensor],
    *,
    batch_size: int,
    progress: Callable[[int, int], object],
) -> tuple[dict[str, Tensor], float]:
    """The refit tensors by stored name, in the shapes that they have without the zeros that fill a
    checkpoint up, in a's dtypes; and the FLOPs, by whole forward passes.

    Memory: three live models in float32, and the sums of the layers that share an input. The data
    are run through once for every such input.
    """
    model = PleasModel(pair, apart, Refitting(form="none"))
    a = Network(pair.a, device=problem.device)
    b = in_order(pair.b, orders, device=problem.device)
    merged = widened_network(model, device=problem.device)
    first, second = (watched(network, pair.shapes) for network in (a, b))
    wide = watched(merged, {name: model.shape(name) for name in model.names})
    written: list[str] = []

    def write(name: str, values: Tensor) -> None:
        merged.write(name, filled(values, model.shape(name)))
        written.append(name)
        progress(min(len(written), len(pair.layers)), len(pair.layers))

    start = {name: model.unfilled(name) for name in model.names}
    found = refit(
        first,
        second,
        model.merge,
        pair.layers,
        start,
        _data(problem, batch_size),
        LeastSquaresSettings(form="sequential", targets=settings.targets, ridge=settings.ridge),
        merged=Merged(wide, write),
    )
    return found.tensors, sum(network.flops for network in (a, b, merged))


def _data(problem: Problem, batch_size: int) -> Data:
    """Each source's own examples, and those that stand under both names."""
    one, two = (dict.fromkeys(problem.calibration.of(name)) for name in problem.sources)
    cut: dict[str, Any] = {
        "both": [example for example in one if example in two],
        "a": [example for example in one if example not in two],
        "b": [example for example in two if example not in one],
    }
    return Data(**{whose: Batches(part, batch_size) for whose, part in cut.items()})
