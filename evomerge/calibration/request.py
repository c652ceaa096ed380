"""A recipe file that asks for a fit: `calibration` and `fit` beside what a recipe has.

    method: regmean
    base: zoo/base
    sources: {sort: zoo/sort, reverse: zoo/reverse}
    calibration: {sort: {task: sort}, reverse: {task: reverse}}
    fit: {batch_size: 8}               # settings of the fit; each has a default
    parameters: {off_diagonal: 0.9}    # of the merge, free to vary afterwards

Turns it into the problem that a fit is given. Knows no fit in particular.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from evomerge.calibration.entries import CalibrationSpec
from evomerge.calibration.load import load_calibration
from evomerge.checkpoints.adapted import open_models
from evomerge.checkpoints.compare import compare, other_depths
from evomerge.checkpoints.weights import Model
from evomerge.documents import read_yaml
from evomerge.errors import SpecError
from evomerge.merging.fitted import registry
from evomerge.merging.fitted.base import Fitter, Problem, Settings
from evomerge.merging.methods.registry import check
from evomerge.merging.methods.registry import facts as facts_of
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.merging.recipe_file import load_recipe
from evomerge.spec import problems


@dataclass(frozen=True)
class Request:
    """What is to be fitted for a recipe, and on what."""

    recipe: Recipe
    fitter: Fitter
    settings: Settings
    calibration: CalibrationSpec
    subject: str  # what faults are said of: the recipe's file

    def with_artifact(self, folder: Path) -> Recipe:
        """The recipe, once the artifact lies at `folder`."""
        return replace(self.recipe, artifact=ModelRef(str(folder)))


def wants_fit(path: Path) -> bool:
    """Whether a recipe file says how an artifact is to be fitted, and names none."""
    document = read_yaml(path)
    return (
        isinstance(document, Mapping) and "calibration" in document and not document.get("artifact")
    )


def load_request(path: Path) -> Request:
    """Read a recipe file that asks for a fit. Raises SpecError with every problem."""
    document = read_yaml(path)
    if isinstance(document, Mapping) and "experts" in document and "method" not in document:
        words = "are merged by `evomerge merge`, which fits nothing apart"
        raise SpecError(
            str(path), [f"experts: {words}; to fit what a search needs, say `method: m_smoe`"]
        )
    recipe = load_recipe(path)
    assert isinstance(document, Mapping)  # as load_recipe has found
    faults: list[str] = []
    try:
        kind = facts_of(recipe.method).artifact
    except Exception:  # `check` says it better
        kind = None
    faults += check(replace(recipe, artifact=ModelRef("")) if kind else recipe)
    if kind is None:
        if not faults:
            faults.append(f"{recipe.method} looks at no data: leave `calibration` and `fit` out")
        raise SpecError(str(path), faults)
    fitter = registry.get(kind)
    settings = _settings(fitter, document.get("fit") or {}, faults)
    names = [source.name for source in recipe.sources]
    folder = path.resolve().parent
    calibration = CalibrationSpec.read(document.get("calibration"), names, folder, faults)
    if fitter.needs_base and recipe.base is None:
        faults.append(f"{recipe.method} is fitted on task vectors and needs a `base`")
    if settings is None or calibration is None or faults:
        raise SpecError(str(path), faults)
    return Request(recipe, fitter, settings, calibration, str(path))


def open_problem(request: Request, *, device: str) -> Problem:
    """Models opened and read once, data tokenised. Raises UserError for what does not fit."""
    recipe = request.recipe
    models = open_models(model.path for model in recipe.models)
    base = models[recipe.base.path] if recipe.base else None
    sources = {s.name: models[s.model.path] for s in sorted(recipe.sources, key=lambda s: s.name)}
    anchor = base or models[recipe.sources[0].model.path]
    advice = "a fit takes models of one vocabulary"
    faults = compare(anchor, sources, advice=advice) + other_depths(anchor, sources)
    if faults:
        raise SpecError(request.subject, faults)
    calibration = load_calibration(
        request.calibration, list(sources), tokenizer_of(anchor), seed=recipe.seed
    )
    digests = {path: model.scan().digest for path, model in models.items()}
    return Problem(base, sources, digests, calibration, device, recipe.seed)


def _settings(fitter: Fitter, document: object, faults: list[str]) -> Settings | None:
    try:
        return fitter.settings.model_validate(document)
    except ValidationError as error:
        faults.extend(problems(error, fitter.settings, "fit"))
        return None


def tokenizer_of(model: Model) -> object:
    """A model's tokenizer. Raises SpecError where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(model.path, [f"its tokenizer cannot be loaded: {reason}"]) from None
