"""Refinement: gradient steps on the genes of a study's best trial, and what is kept of them.

A refinement is written into the study first, and its trial is made from that record: so it is made
once, whatever is killed between. It is scored as any trial is and may win; the sampler is not told.
Only `descend` needs scipy, and nothing here torch. Knows nothing of terminals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from evomerge.errors import UserError
from evomerge.service.verdict import Weights, standing_of
from evomerge.store.base import StudyRecord
from evomerge.trial import CANDIDATES, Genome, State, Trial

if TYPE_CHECKING:
    from evomerge.merging.fitted.gradient import MergeLoss
    from evomerge.merging.recipe import Recipe
    from evomerge.space.layer_weights import LayerWeights

REFINEMENTS = "refinements"
Progress = Callable[[int, int], object]
"""(steps done, steps in all)."""


@dataclass(frozen=True)
class Refinement:
    """What gradient steps made of a trial's genome, and what they cost.

    `value` is the trial's own on the search items, `before` and `after` are the loss on the
    calibration data, `evaluations` how often it and its gradient were computed. `evolution_gain` is
    what the best value of the search had risen in the trials before it that took
    `evolution_seconds` of workers' time, as near to `seconds` as there were.
    """

    origin: int
    value: float
    genome: Genome
    loss: str
    calibration: str
    steps: int
    evaluations: int
    before: float
    after: float
    seconds: float
    flops: float
    evolution_seconds: float
    evolution_gain: float

    def is_of(self, origin: int, calibration: str, loss: str, steps: int) -> bool:
        """Whether these are what it is of."""
        known = (self.origin, self.calibration, self.loss, self.steps)
        return known == (origin, calibration, loss, steps)


def refinements_of(record: StudyRecord) -> list[Refinement]:
    """The refinements of a study, in their order, which is that of its trials of kind `refined`."""
    found = record.inspection.get(REFINEMENTS, ())
    return [Refinement(**{**entry, "genome": tuple(entry["genome"])}) for entry in found]


def kept_refinements(record: StudyRecord) -> dict[str, Any]:
    """The part of an inspection that says what was refined."""
    return {key: value for key, value in record.inspection.items() if key == REFINEMENTS}


def with_refinement(record: StudyRecord, refinement: Refinement) -> StudyRecord:
    """The study with one more refinement."""
    entries = [*record.inspection.get(REFINEMENTS, ()), asdict(refinement)]
    return replace(record, inspection={**record.inspection, REFINEMENTS: entries})


def elite(trials: Sequence[Trial], weights: Weights, number: int | None = None) -> Trial:
    """The trial to refine: `number`, or the best on the search items. Raises UserError."""
    able = [t for t in trials if t.kind in CANDIDATES and t.state is State.COMPLETE and t.genome]
    if able and len(able[0].values or ()) != 1:
        raise UserError("several objectives: gradients are of one; nothing to refine")
    if number is not None:
        able = [t for t in able if t.number == number]
    if not able:
        what = (
            "no trial of the search has" if number is None else f"trial {number} has no genome or"
        )
        raise UserError(f"{what} no score yet; nothing to refine")
    return max(able, key=lambda t: standing_of(t, weights))


def last_gain(trials: Sequence[Trial], seconds: float) -> tuple[float, float]:
    """(seconds, gain): how much the best value rose over the last search trials that took at least
    that much of workers' time, and what they took; all of the search where it took less."""
    done = [t for t in trials if t.kind == "search" and t.state is State.COMPLETE and t.values]
    done.sort(key=_finished)
    spent, first = 0.0, len(done)
    while first > 1 and spent < seconds:  # the first trial has no best before it
        first -= 1
        spent += done[first].seconds
    best = [max(t.values[0] for t in part if t.values) for part in (done[:first], done) if part]
    return spent, best[-1] - best[0] if best else 0.0


def descend(
    start: Genome,
    weights: LayerWeights,
    loss: MergeLoss,
    decode: Callable[[Genome], Recipe],
    *,
    steps: int,
    progress: Progress = lambda done, total: None,
) -> tuple[Genome, float, float, int]:
    """Lower a loss over the genes by L-BFGS-B in [0, 1]: (genome, loss before, loss after, how
    often it was computed, at most `steps` times and once at the start).

    The best of all that was computed is taken, so the loss never rises. Discrete genes stay.

    Source: Byrd, Lu, Nocedal and Zhu 1995, as scipy has it.
    """
    import numpy as np
    from scipy.optimize import minimize

    free = weights.free
    seen: list[tuple[float, Genome]] = []

    def genome(x: Any) -> Genome:
        moved = list(start)
        for place, value in zip(free, np.clip(x, 0.0, 1.0).tolist(), strict=True):
            moved[place] = value
        return tuple(moved)

    def valued(x: Any) -> tuple[float, Any]:
        if len(seen) > steps:
            raise _SpentError
        here = genome(x)
        value, gradients = loss.gradient(decode(here))
        seen.append((value, here))
        progress(len(seen) - 1, steps)
        return value, weights.chain(here, gradients)[free]

    try:
        first = np.array([start[place] for place in free])
        bounds = [(0.0, 1.0)] * len(free)
        minimize(valued, first, jac=True, method="L-BFGS-B", bounds=bounds)
    except _SpentError:
        pass
    after, best = min(seen)
    return best, seen[0][0], after, len(seen)


class _SpentError(Exception):
    """All steps are taken."""


def gains(refinement: Refinement, refined: Trial) -> dict[str, Any]:
    """A refinement as the report has it: what its steps bought per second, and evolution alone."""
    gain = refined.values[0] - refinement.value if refined.values else None
    evolved = refinement.evolution_seconds
    return {
        "trial": refined.number,
        "origin": refinement.origin,
        "state": refined.state.value,
        "loss": refinement.loss,
        "before": refinement.before,
        "after": refinement.after,
        "seconds": refinement.seconds,
        "flops": refinement.flops,
        "gain": gain,
        "gain_per_second": None if gain is None else gain / max(refinement.seconds, 1e-9),
        "evolution_seconds": evolved,
        "evolution_gain": refinement.evolution_gain,
        "evolution_gain_per_second": refinement.evolution_gain / evolved if evolved else None,
    }


def gains_text(gained: Mapping[str, Any]) -> str:
    """The same in a sentence."""
    result = f"is {gained['state']}" if gained["gain"] is None else f"gained {gained['gain']:+.3f}"
    return (
        f"Trial {gained['trial']}, trial {gained['origin']} refined by {gained['seconds']:.1f} s of"
        f" gradient steps, {result} on the search items; the search's last"
        f" {gained['evolution_seconds']:.1f} s before had gained {gained['evolution_gain']:+.3f}."
    )


def _finished(trial: Trial) -> tuple[float, int]:
    ends = [a.finished_at.timestamp() for a in trial.attempts if a.finished_at is not None]
    return max(ends, default=-math.inf), trial.number
