"""mergekit's merge methods as data: their parameters, where each may stand and its default.

Facts of mergekit 0.1.5. Knows nothing of files and of our methods but the names of parameters that
mergekit decides for its user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()
"""Stands for the default of a parameter that a mergekit file must give."""


@dataclass(frozen=True)
class MergekitMethod:
    """Parameters by name with their defaults: `source` each model's, `recipe` the merge's.

    `unused` may be given and have no effect, here or in mergekit. `base` says what `base_model`
    is: the `start` of the task vectors, the `first` of two models, or one more `model`.
    `ours` is the name of our method where it is another.
    """

    source: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ("int8_mask",)
    base: str = "start"
    ours: str | None = None


def _task_vectors(*, normalize: bool, rescale: bool, **source: float) -> MergekitMethod:
    return MergekitMethod(
        source={"weight": REQUIRED, "density": 1.0, **source},
        recipe={"normalize": normalize, "rescale": rescale, "lambda": 1.0},
    )


METHODS: Mapping[str, MergekitMethod] = {
    "linear": MergekitMethod({"weight": REQUIRED}, {"normalize": True}, base="model"),
    "slerp": MergekitMethod(recipe={"t": REQUIRED}, base="first"),
    "nuslerp": MergekitMethod(
        {"weight": REQUIRED}, {"nuslerp_flatten": True, "nuslerp_row_wise": False}
    ),
    "multislerp": MergekitMethod(
        {"weight": REQUIRED}, {"normalize_weights": True}, unused=("int8_mask", "eps")
    ),
    # ours iterates until it converges
    "karcher": MergekitMethod(unused=("int8_mask", "max_iter", "tol"), base="model"),
    "task_arithmetic": MergekitMethod(
        {"weight": REQUIRED},
        {"normalize": False, "lambda": 1.0},
        unused=("int8_mask", "density", "rescale"),
    ),
    "ties": _task_vectors(normalize=True, rescale=False),
    "dare_linear": _task_vectors(normalize=False, rescale=True),
    "dare_ties": _task_vectors(normalize=False, rescale=True),
    "breadcrumbs": _task_vectors(normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": _task_vectors(normalize=False, rescale=False, gamma=0.01),
    "della": _task_vectors(normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _task_vectors(normalize=False, rescale=True, epsilon=0.15),
    "sce": MergekitMethod(recipe={"select_topk": 1.0}),
    "ram": MergekitMethod(recipe={"epsilon": 1e-5}),
    "ramplus_tl": MergekitMethod(recipe={"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, ours="ram"),
    "model_stock": MergekitMethod(recipe={"filter_wise": False}),
    "nearswap": MergekitMethod(recipe={"t": REQUIRED}),
    "arcee_fusion": MergekitMethod(),
    "passthrough": MergekitMethod({"scale": 1.0}, base="model"),
}

DECIDED: Mapping[str, str | float] = {
    "scope": "tensor",
    "ties_at_threshold": "exact",
    "sign_tie": "positive",
    "aggregate": "mean",
    "cosine": "free",
    "uniform_below": 1e-6,
}
"""Parameters of ours that mergekit does not have, and the value under which we do what it does."""

RENAMED: Mapping[str, str] = {
    "select_topk": "density",
    "normalize_weights": "normalize",
    "filter_wise": "vectors",
    "nuslerp_flatten": "vectors",
    "nuslerp_row_wise": "vectors",
}
"""Our names of parameters that mergekit calls otherwise."""

CHOICES: Mapping[tuple[str, bool], str] = {
    ("rescale", True): "l1",
    ("rescale", False): "none",
    ("filter_wise", True): "row",
    ("filter_wise", False): "tensor",
    ("nuslerp_flatten", True): "tensor",
    ("nuslerp_flatten", False): "row",
    ("nuslerp_row_wise", True): "column",
}
"""What a switch of mergekit's is called where ours is a choice."""


def is_mergekit(document: object) -> bool:
    """Whether a document is one of mergekit's, for merging or for mergekit-evolve."""
    marks = {"merge_method", "genome", "models", "slices", "modules"}
    if not isinstance(document, Mapping) or "method" in document:
        return False
    return not marks.isdisjoint(document)
