"""What `methods_table.py` tries of every merge method: a small grid each, declared here and nowhere
else.

Knows no model and no task. A test holds this against the registry, so that no method is left out of
the table in silence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """Every combination of `parameters`, on each of `fits` (settings of the method's fit).

    Parameters in the order given, the first value of each first: the first of equals is chosen.
    `label` tells the rows of one method apart.
    """

    parameters: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fits: Sequence[Settings] = ({},)
    label: str = ""

    def settings(self) -> Iterator[tuple[Settings, Settings]]:
        """Settings of a fit, and parameters of the merge."""
        names = list(self.parameters)
        for fit in self.fits:
            for values in itertools.product(*self.parameters.values()):
                yield fit, dict(zip(names, values, strict=True))


# of a sum of four task vectors; 0.25 is their mean
SUM = (0.25, 0.15, 0.2, 0.3, 0.35, 0.4, 0.5)
SHORT_SUM = (0.25, 0.15, 0.2, 0.3, 0.4)
# of a mean of what agrees
MEAN = (1.0, 0.3, 0.5, 0.7, 1.2)
# as the released code has it, but for its φ
_DAM_RELEASED = {"tokens": "all", "batch_size": 1, "epochs": 1, "learning_rate": 1e-3}
_DAM_AROUND_BASE = {
    "teacher": "cached",
    "anchor": "base",
    "train": ["linears", "embeddings", "norms", "biases"],
}

GRIDS: Mapping[str, tuple[Grid, ...]] = MappingProxyType(
    {
        # --- of whole models
        "linear": (Grid(label="uniform average"),),
        "karcher": (Grid({"origin": ("zero", "base")}),),
        "multislerp": (Grid({"origin": ("zero", "base")}),),
        "model_stock": (Grid({"vectors": ("tensor", "row"), "cosine": ("clamped", "free")}),),
        # --- sums of task vectors
        "task_arithmetic": (Grid({"lambda": (*SUM, 0.1, 0.6, 0.7, 0.8, 0.9, 1.0)}),),
        "dare_linear": (Grid({"density": (0.8, 0.5), "lambda": SHORT_SUM}),),
        "della_linear": (Grid({"density": (0.8, 0.5), "lambda": SHORT_SUM}),),
        "breadcrumbs": (Grid({"density": (0.9, 0.6), "lambda": SHORT_SUM}),),
        "consensus": (Grid({"agree": (1, 2), "lambda": SHORT_SUM}),),
        "widen": (Grid({"calibration": (1.0, 0.5), "lambda": (1.0, 0.3, 0.5)}),),
        # --- elections
        "ties": (Grid({"density": (1.0, 0.2, 0.5, 0.8), "lambda": MEAN}),),
        "dare_ties": (Grid({"density": (0.8, 0.5), "lambda": (*SHORT_SUM, 0.5)}),),
        "della": (Grid({"density": (0.8, 0.5), "lambda": MEAN}),),
        "breadcrumbs_ties": (Grid({"density": (0.9, 0.6), "lambda": (*SHORT_SUM, 0.5)}),),
        "consensus_ties": (
            Grid({"density": (0.8, 0.2), "agree": (1, 2), "lambda": (0.3, 0.4, 0.5, 0.6)}),
        ),
        "sce": (Grid({"density": (1.0, 0.01, 0.03, 0.1, 0.3)}),),
        "ram": (Grid({"epsilon": (1e-5, 1e-3, 1e-2)}),),
        "pcb": (Grid({"ratio": (0.1, 0.05, 0.2), "lambda": MEAN}),),
        # --- singular vectors
        "iso_c": (Grid({"lambda": (1.0, 0.3, 0.45, 0.6, 0.8)}),),
        "iso_cts": (Grid({"lambda": (1.0, 0.3, 0.45, 0.6, 0.8)}),),
        "tsv_m": (Grid({"lambda": (1.0, 0.2, 0.3, 0.4, 0.6)}),),
        # --- learned from data
        "greedy_soup": (Grid(fits=({}, {"metric": "loss"})),),
        "learned_soup": (
            Grid(
                {"blend": (1.0, 0.5)},
                fits=({}, {"lr": 0.2}, {"granularity": "model"}),
            ),
        ),
        "git_rebasin": (Grid(fits=({}, {"similarity": "correlation"})),),
        "fisher": (Grid({"floor": (1e-6, 1e-2, 0.1, 1.0)}, fits=({}, {"labels": "data"})),),
        "regmean": (Grid({"off_diagonal": (0.9, 0.0, 0.5, 0.8, 0.95, 1.0)}),),
        "mats": (Grid({"iterations": (50, 3, 10), "init": ("average", "task_arithmetic")}),),
        "sens_merging": (
            Grid(
                {
                    "alignment": ("distance", "similarity"),
                    "temperature": (1.0, 0.1),
                    "lambda": SHORT_SUM,
                },
            ),
            Grid(
                {
                    "base_method": ("ties",),
                    "density": (1.0, 0.5),
                    "temperature": (1.0, 0.1),
                    "lambda": (0.3, 0.5, 0.7),
                },
                label="on ties",
            ),
            Grid(
                {
                    "base_method": ("dare_linear",),
                    "density": (0.8,),
                    "temperature": (1.0, 0.1),
                    "lambda": SHORT_SUM,
                },
                label="on dare_linear",
            ),
        ),
        "adamerging": (
            Grid(
                {"scale": (1.0, 0.6, 0.8)},
                fits=({}, {"granularity": "task", "lr": 1e-2, "steps": 100}),
                label="entropy",
            ),
            Grid(
                {"scale": (1.0, 0.8, 1.2)},
                fits=({"plus_plus": True, "lr": 1e-2, "steps": 100},),
                label="entropy, ++",
            ),
            Grid(
                {"scale": (1.0, 0.8, 1.2)},
                fits=tuple({"loss": "kl", "lr": lr, "steps": 100} for lr in (5e-3, 2e-3, 1e-2)),
                label="KL",
            ),
        ),
        "dam": (
            Grid(label="defaults"),
            Grid(fits=(_DAM_RELEASED,), label="as released"),
            Grid(
                {"detail": (1.0, 0.5)},
                fits=(
                    {**_DAM_AROUND_BASE, "epochs": 12},
                    {**_DAM_AROUND_BASE, "epochs": 24},
                    {**_DAM_AROUND_BASE, "optimizer": "adamw"},
                    {**_DAM_AROUND_BASE, "granularity": "tensor"},
                ),
                label="tuned",
            ),
        ),
    }
)

LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "slerp": "takes exactly two sources, and these are four",
        "nuslerp": "takes exactly two sources, and these are four",
        "nearswap": "takes exactly one source beside the base",
        "arcee_fusion": "takes exactly one source beside the base",
        "passthrough": "takes one source, which is a row of its own",
    }
)
