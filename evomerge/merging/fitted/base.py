"""The contract of a fit: what it is given, what it must leave, and how it is called.

A fit looks at data once and writes an artifact; a merge method applies the artifact as often as a
search likes. Knows no file of calibration data and no study.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from evomerge.checkpoints.weights import Model
from evomerge.merging.fitted.artifact import Draft, Provenance, draft
from evomerge.merging.fitted.calibration import Calibration

if TYPE_CHECKING:
    from evomerge.merging.fitted.network import Network


class Settings(BaseModel):
    """What a user may set of a fit; every field has a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Watch:
    """Who looks on: `progress(done, total)` in steps, `note` for a line of text."""

    progress: Callable[[int, int], object] = lambda done, total: None
    note: Callable[[str], object] = lambda text: None


@dataclass(frozen=True)
class Problem:
    """What is fitted: models with their contents' digests, and data.

    `sources` by name, sorted; `base` is None for a recipe without. `scale` and the other numbers of
    the recipe are not here: they are the merge method's, and free to vary afterwards.
    """

    base: Model | None
    sources: Mapping[str, Model]
    digests: Mapping[str, str]
    calibration: Calibration
    device: str = "cpu"
    seed: int = 0

    @property
    def anchor(self) -> Model:
        """The model whose architecture, config and tensor names the merge has."""
        return self.base or next(iter(self.sources.values()))

    def task_vector(self, source: str, name: str) -> Tensor:
        """θᵢ − θ₀ of one tensor, float32, in its shape."""
        assert self.base is not None
        return self.weight(self.sources[source], name) - self.weight(self.base, name)

    def weight(self, model: Model, name: str) -> Tensor:
        """One tensor of a model, float32, a copy on the problem's device."""
        return model.tensor(name).to(self.device, torch.float32, copy=True)


class Fitter(ABC):
    """One kind of fit. Instances hold no state.

    `name` is the kind of artifact that it writes. `needs_base`: without a base it is refused.
    `needs_labels`: the loss counts answers, and data without them is text to be continued.
    `needs_gradients`: it runs backward passes.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[type[Settings]]
    needs_base: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    @abstractmethod
    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        """Look at the data, and `draft.finish` the artifact.

        `draft.state` is where an interrupted fit of the same problem stopped: gone on with, the
        artifact is the same bit for bit: facts hold nothing that depends on time or chance. Raises
        UserError for data or models that do not do.
        """


def fit(
    fitter: Fitter,
    problem: Problem,
    settings: Settings,
    directory: Path,
    *,
    watch: Watch | None = None,
) -> None:
    """Fit, and leave the artifact at `directory`, whole or not at all.

    Raises ExportError where the folder is taken, UserError for data or models that do not do.
    """
    with draft(directory, provenance(fitter, problem, settings)) as work:
        fitter.fit(problem, settings, work, watch or Watch())


def provenance(fitter: Fitter, problem: Problem, settings: Settings) -> Provenance:
    """What the artifact of a fit is made from."""
    return made_from(fitter.name, problem, settings.model_dump(mode="json"), seed=problem.seed)


def made_from(kind: str, problem: Problem, settings: Mapping[str, Any], *, seed: int) -> Provenance:
    """What an artifact of some kind is made from, be it that of a fit or what fits share."""
    return Provenance(
        kind=kind,
        base=problem.digests[problem.base.path] if problem.base else None,
        sources={n: problem.digests[model.path] for n, model in problem.sources.items()},
        calibration=problem.calibration.digest,
        counts=dict(problem.calibration.counts),
        described=dict(problem.calibration.described),
        settings=settings,
        seed=seed,
        items=problem.calibration.items,
    )


def merged_names(problem: Problem) -> tuple[str, ...]:
    """The float tensors with elements that all models share: what is merged."""
    anchor = problem.anchor
    return tuple(
        name
        for name in anchor.names
        if anchor.dtype(name).is_floating_point
        and 0 not in anchor.shape(name)
        and all(name in model for model in problem.sources.values())
    )


def learned_names(problem: Problem, network: Network) -> list[str]:
    """Those of the merged tensors that are parameters of the network."""
    return [name for name in merged_names(problem) if name in network.parts]
