"""Adam on a few coefficients of a merge: their table, endless batches, steps that survive a crash.

Knows neither what the coefficients mean nor how their gradient is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from evomerge.merging.fitted.base import Watch
from evomerge.merging.fitted.calibration import Batch, Example, batch
from evomerge.merging.methods.masks import mask_key

_STEPS_A_SAVE = 20

Step = Callable[[int], Mapping[str, float]]
"""Of a step's number: sets every coefficient's `.grad`, and tells its losses by name."""


class Rows:
    """The rows of a table of coefficients: one for each tensor, or one that all share."""

    def __init__(self, names: Sequence[str], *, shared: bool) -> None:
        self.count = 1 if shared else len(names)
        self._rows = {name: 0 if shared else number for number, name in enumerate(names)}

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> int:
        return self._rows[name]


class Saves(Protocol):
    """Keeps how far a descent has come; a `Draft` does."""

    state: tuple[dict[str, Tensor], dict[str, Any]] | None

    def save(
        self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], *, flops: float
    ) -> None: ...


class Descent:
    """Coefficients (updated in place) with their Adam moments, from a draft's state.

    `optimiser` is of these coefficients, one of Adam's kind; `carried` are further tensors that
    steps change in place and that go on where they were. `curve` holds the losses of all steps so
    far, by name.
    """

    def __init__(
        self,
        coefficients: Mapping[str, Tensor],
        lr: float,
        draft: Saves,
        *,
        optimiser: torch.optim.Adam | None = None,
        carried: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._coefficients = coefficients
        self._carried = carried or {}
        self._draft = draft
        self._adam = optimiser or torch.optim.Adam(list(coefficients.values()), lr=lr)
        self.curve: dict[str, list[float]] = {}
        self._done = 0
        if draft.state is not None:
            self._go_on(*draft.state)

    def run(self, steps: int, step: Step, watch: Watch, flops: Callable[[], float]) -> None:
        """Descend until `steps` are done in all. `flops` tells those of this attempt."""
        for number in range(self._done, steps):
            for name, loss in step(number).items():
                self.curve.setdefault(name, []).append(loss)
            self._adam.step()
            self._done = number + 1
            if self._done % _STEPS_A_SAVE == 0:
                self._save(flops())
            watch.progress(self._done, steps)

    def _save(self, flops: float) -> None:
        tensors = {f"carried.{name}": value for name, value in self._carried.items()}
        for name, value in self._coefficients.items():
            moments = self._adam.state[value]
            tensors |= {f"value.{name}": value.detach()}
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        self._draft.save(tensors, {"done": self._done, "curve": self.curve}, flops=flops)

    def _go_on(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        self._done, self.curve = notes["done"], notes["curve"]
        for name, value in self._carried.items():
            value.copy_(tensors[f"carried.{name}"])
        for name, value in self._coefficients.items():
            with torch.no_grad():
                value.copy_(tensors[f"value.{name}"])
            self._adam.state[value] = {
                "step": torch.tensor(float(self._done)),
                "exp_avg": tensors[f"exp_avg.{name}"].to(value.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(value.device),
            }


def endless_batch(
    examples: Sequence[Example], step: int, size: int, *, seed: int, name: str = ""
) -> Batch:
    """The batch of one step of a stream that goes through the examples round after round, each in a
    random order of its own, keyed by (seed, name, round)."""
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(step * size, (step + 1) * size):
        number, place = divmod(position, len(examples))
        if number not in orders:
            key = mask_key(seed, name, f"round {number}") % 2**63
            generator = torch.Generator().manual_seed(key)
            orders[number] = torch.randperm(len(examples), generator=generator).tolist()
        chosen.append(examples[orders[number][place]])
    return batch(chosen)
