"""The model that a worker keeps in memory: loaded once, and again where a candidate is wider.

Knows no trial and no store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.adapted import open_models
from evomerge.checkpoints.skeleton import blank
from evomerge.checkpoints.weights import Weights
from evomerge.errors import InfrastructureError
from evomerge.merging.materialise import Materialiser, load_model
from evomerge.merging.merge import DTYPES, Merge
from evomerge.merging.methods.registry import STRUCTURAL
from evomerge.merging.prepared import Prepared, cache_folder
from evomerge.merging.recipe import Recipe
from evomerge.scoring.resident import ResidentScorer
from evomerge.scoring.room import twice
from evomerge.scoring.tasks import load_tasks
from evomerge.spec import StudySpec

if TYPE_CHECKING:
    from torch.nn import Module


Live = tuple[Materialiser, ResidentScorer]
"""What writes to the live model, and what scores it."""


class Resident:
    """A live model, of the base's shapes to begin with.

    `devices` are those that it is spread over; `beat` is called after every forward pass.
    """

    def __init__(
        self, spec: StudySpec, dtype: str, devices: Sequence[str], beat: Callable[[], None]
    ) -> None:
        self._spec, self._dtype, self._devices, self._beat = spec, dtype, devices, beat
        self._models = open_models((spec.base, *spec.sources.values()))
        self._base = self._models[spec.base]
        self._tasks = load_tasks(spec.objective)
        model, self._tokenizer = twice(
            lambda: load_model(self._base, dtype, *devices), spec.base, devices[0]
        )
        self._generation = getattr(model, "generation_config", None)
        self._live: Live | None = self._held(model)
        self._config: Mapping[str, Any] = self._base.config

    def fitting(self, recipe: Recipe) -> tuple[Callable[[], None], ResidentScorer]:
        """What writes a recipe into a model of its result's shapes, and what scores that: the model
        there is, wherever it fits."""
        merge = Merge(recipe, self._models) if recipe.method in STRUCTURAL else None
        wanted: Weights = merge.anchor if merge is not None else self._base
        if self._live is None or _differ(wanted.config, self._config):
            self._live = None  # there is room for one
            self._live = self._held(self._blank(wanted, recipe.method))
            self._config = wanted.config
        materialiser, scorer = self._live
        return partial(materialiser.write, recipe, merge), scorer

    def _blank(self, wanted: Weights, method: str) -> Module:
        if len(self._devices) > 1:
            raise InfrastructureError(
                f"{method} changes the widths of the model, which is only done on one GPU yet; set"
                " `workers.num_gpus: 1`"
            )
        dtype, device = DTYPES[self._dtype], self._devices[0]
        made: Any = blank(wanted, otherwise="it cannot be scored", dtype=dtype, device=device)
        made.generation_config = self._generation  # a file beside the config says where texts end
        module: Module = made
        return module

    def _held(self, model: Module) -> Live:
        model.register_forward_hook(lambda *_: self._beat())
        objective, evaluation = self._spec.objective, self._spec.evaluation
        scorer = ResidentScorer(model, self._tokenizer, objective, evaluation, tasks=self._tasks)
        return Materialiser(model, self._models, store=Prepared(cache_folder())), scorer


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs are of models of other shapes; a dtype is no shape."""
    keys = {*one, *other} - {"dtype", "torch_dtype"}
    return any(one.get(key) != other.get(key) for key in keys)
