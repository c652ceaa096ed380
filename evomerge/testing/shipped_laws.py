"""Which laws the shipped merge methods obey, under which parameters: data, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.merging.methods.sens_merging import BASE_METHODS
from evomerge.testing.merge_laws import (
    Law,
    Obeyed,
    Parameters,
    copies_are_source,
    cutting_is_irrelevant,
    extremes_stay_finite,
    inputs_are_untouched,
    neutral_is_source,
    obeyed,
    scales_with_task_vectors,
    seed_decides,
    supports_are_nested,
    untrained_is_base,
    weightless_is_absent,
    zero_scale_is_base,
)

_TASK_VECTORS: tuple[tuple[Law, Parameters], ...] = (
    (zero_scale_is_base, {"lambda": 0.0}),
    (zero_scale_is_base, {"weight": 0.0}),
    (untrained_is_base, {}),
    (scales_with_task_vectors, {}),
)
_SPHERE: tuple[tuple[Law, Parameters], ...] = (
    (untrained_is_base, {"weight": 0.3, "normalize": True}),
    (copies_are_source, {"weight": 0.3, "normalize": True}),
    (scales_with_task_vectors, {}),
    *((cutting_is_irrelevant, {"origin": origin}) for origin in ("zero", "base")),
)
_NEUTRAL: Parameters = {"lambda": 1.0, "weight": 1.0, "normalize": False}
_MEAN: Parameters = {"lambda": 1.0, "weight": 1.0, "normalize": True}

OBEYED: Mapping[str, Obeyed] = MappingProxyType(
    {
        "linear": obeyed(
            (neutral_is_source, {"weight": 0.7, "normalize": True}),
            (neutral_is_source, {"weight": 1.0, "normalize": False}),
            (untrained_is_base, {"weight": 0.3, "normalize": True}),
            (copies_are_source, {"weight": 0.3, "normalize": True}),
            (scales_with_task_vectors, {}),
        ),
        "greedy_soup": obeyed((copies_are_source, {})),
        "dam": obeyed(
            (inputs_are_untouched, {"detail": 0.0}), (cutting_is_irrelevant, {"scale": 1.0})
        ),
        "fisher": obeyed(
            (weightless_is_absent, {}),
            (neutral_is_source, {"weight": 0.7}),
            (untrained_is_base, {}),
            (copies_are_source, {}),
            (scales_with_task_vectors, {}),
        ),
        "regmean": obeyed(
            (weightless_is_absent, {}),
            (neutral_is_source, {"weight": 0.7}),
            (untrained_is_base, {}),
            (copies_are_source, {}),
            (scales_with_task_vectors, {}),
        ),
        "mats": obeyed(
            (weightless_is_absent, {}),
            (neutral_is_source, {"weight": 0.7, "init": "average"}),
            (untrained_is_base, {}),
            (zero_scale_is_base, {"iterations": 0.0, "init": "task_arithmetic", "lambda": 0.0}),
            (copies_are_source, {"init": "average"}),
            (scales_with_task_vectors, {}),
        ),
        "passthrough": obeyed((neutral_is_source, {"scale": 1.0})),
        "task_arithmetic": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, _NEUTRAL),
            (neutral_is_source, {"lambda": 1.0, "weight": 0.3, "normalize": True}),
            (copies_are_source, _MEAN),
        ),
        "ties": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, {**_NEUTRAL, "density": 1.0}),
            (neutral_is_source, {**_MEAN, "density": 1.0, "weight": 0.3, "aggregate": "mean"}),
            (copies_are_source, {**_MEAN, "density": 1.0, "aggregate": "mean"}),
            (cutting_is_irrelevant, {"scope": "global", "sign_tie": "majority"}),
            (cutting_is_irrelevant, {"scope": "tensor", "weight": 1.0, "sign_tie": "majority"}),
            (supports_are_nested, {**_MEAN, "ties_at_threshold": "exact"}),
        ),
        "dare_linear": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, {**_NEUTRAL, "density": 1.0}),
            (copies_are_source, {**_MEAN, "density": 1.0}),
            (seed_decides, {**_NEUTRAL, "density": 0.5}),
            (supports_are_nested, _NEUTRAL),
            (cutting_is_irrelevant, {"rescale": "l1", "density": 0.5}),
        ),
        "dare_ties": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, {**_NEUTRAL, "density": 1.0}),
            (copies_are_source, {**_MEAN, "density": 1.0, "aggregate": "mean"}),
            (seed_decides, {**_NEUTRAL, "density": 0.5}),
            (supports_are_nested, _NEUTRAL),
            (cutting_is_irrelevant, {"rescale": "l1", "density": 0.5, "weight": 1.0}),
        ),
        "consensus": obeyed(
            *_TASK_VECTORS,
            (weightless_is_absent, {}),
            (neutral_is_source, {"lambda": 1.0, "weight": 1.0, "agree": 1.0}),
        ),
        "consensus_ties": obeyed(
            *_TASK_VECTORS,
            (weightless_is_absent, {}),
            (neutral_is_source, {"lambda": 1.0, "weight": 1.0, "density": 1.0, "agree": 1.0}),
            (cutting_is_irrelevant, {"scope": "global", "sign_tie": "majority", "weight": 1.0}),
        ),
        "iso_c": obeyed(*_TASK_VECTORS, (weightless_is_absent, {})),
        "iso_cts": obeyed(*_TASK_VECTORS, (weightless_is_absent, {})),
        "tsv_m": obeyed(
            *_TASK_VECTORS,
            (weightless_is_absent, {}),
            (neutral_is_source, {"lambda": 1.0, "weight": 1.0}),
        ),
        "pcb": obeyed(
            (zero_scale_is_base, {"lambda": 0.0}),
            (zero_scale_is_base, {"weight": 0.0}),
            (zero_scale_is_base, {"ratio": 0.0}),
            (untrained_is_base, {}),
            (weightless_is_absent, {}),
        ),
        "widen": obeyed(
            *_TASK_VECTORS,
            (weightless_is_absent, {}),
            (neutral_is_source, {"lambda": 1.0, "weight": 1.0, "calibration": 1.0}),
        ),
        "slerp": (
            (neutral_is_source, {"t": 1.0}),
            (untrained_is_base, {}),
            (copies_are_source, {}),
            (scales_with_task_vectors, {}),
            (cutting_is_irrelevant, {}),
            (inputs_are_untouched, {}),
            (extremes_stay_finite, {}),
        ),
        "nuslerp": obeyed(*_SPHERE),
        "multislerp": obeyed(
            *_SPHERE,
            (neutral_is_source, {"weight": 0.3, "normalize": True}),
            (weightless_is_absent, {}),
        ),
        "karcher": obeyed(
            *_SPHERE, (neutral_is_source, {"weight": 0.3}), (weightless_is_absent, {})
        ),
        "model_stock": obeyed(
            (untrained_is_base, {}),
            (copies_are_source, {}),
            (scales_with_task_vectors, {}),
            (cutting_is_irrelevant, {"vectors": "row"}),
        ),
        "sce": obeyed(
            (zero_scale_is_base, {"density": 0.0}),
            (neutral_is_source, {"density": 1.0}),
            (untrained_is_base, {}),
            (copies_are_source, {"density": 1.0, "normalize": True}),
            (scales_with_task_vectors, {"uniform_below": 0.0}),
            (cutting_is_irrelevant, {"density": 0.5, "sign_tie": "majority"}),
        ),
        "breadcrumbs": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, {**_NEUTRAL, "density": 1.0}),
            (copies_are_source, {**_MEAN, "density": 1.0}),
            (supports_are_nested, {**_NEUTRAL, "scope": "tensor"}),
            (weightless_is_absent, {}),
            *((cutting_is_irrelevant, {"scope": scope}) for scope in ("row", "tensor")),
        ),
        "breadcrumbs_ties": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, {**_NEUTRAL, "density": 1.0}),
            (copies_are_source, {**_MEAN, "density": 1.0, "aggregate": "mean"}),
            (supports_are_nested, {**_NEUTRAL, "scope": "tensor"}),
            (weightless_is_absent, {}),
            *((cutting_is_irrelevant, {"scope": scope}) for scope in ("row", "tensor")),
        ),
        "della": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, {**_NEUTRAL, "density": 1.0}),
            (copies_are_source, {**_MEAN, "density": 1.0, "aggregate": "mean"}),
            (seed_decides, {**_NEUTRAL, "density": 0.5}),
            (supports_are_nested, _NEUTRAL),
            (weightless_is_absent, {}),
            (cutting_is_irrelevant, {"rescale": "l1", "density": 0.5, "weight": 1.0}),
        ),
        "della_linear": obeyed(
            *_TASK_VECTORS,
            (neutral_is_source, {**_NEUTRAL, "density": 1.0}),
            (copies_are_source, {**_MEAN, "density": 1.0}),
            (seed_decides, {**_NEUTRAL, "density": 0.5}),
            (supports_are_nested, _NEUTRAL),
            (weightless_is_absent, {}),
            (cutting_is_irrelevant, {"rescale": "l1", "density": 0.5}),
        ),
        "ram": obeyed(
            (zero_scale_is_base, {"epsilon": 1e9, "r": 0.0}),
            (neutral_is_source, {"epsilon": 0.0, "r": 0.0}),
            (untrained_is_base, {}),
            (copies_are_source, {"epsilon": 0.0, "r": 0.0}),
            (scales_with_task_vectors, {"epsilon": 0.0}),
        ),
        "arcee_fusion": obeyed(
            (neutral_is_source, {"iqr_factor": -1e9}),
            (untrained_is_base, {}),
        ),
        "nearswap": obeyed(
            (zero_scale_is_base, {"t": 0.0}),
            (neutral_is_source, {"t": 1e9}),
            (untrained_is_base, {}),
        ),
        "sens_merging": obeyed(
            (zero_scale_is_base, {"lambda": 0.0}),
            (untrained_is_base, {}),
            (scales_with_task_vectors, {}),
            (neutral_is_source, {"lambda": 1.0, "density": 1.0}),
            (seed_decides, {"base_method": "dare_linear", "lambda": 1.0, "density": 0.5}),
            *((cutting_is_irrelevant, {"base_method": name}) for name in BASE_METHODS),
        ),
        "adamerging": obeyed(
            (zero_scale_is_base, {"scale": 0.0}),
            (untrained_is_base, {}),
        ),
        "learned_soup": obeyed(
            (neutral_is_source, {"blend": 0.0}),
            (untrained_is_base, {}),
            (copies_are_source, {}),
            (scales_with_task_vectors, {}),
        ),
        "git_rebasin": obeyed((weightless_is_absent, {})),
    }
)
"""The laws that each method shipped obeys, with the parameters that the law needs."""
