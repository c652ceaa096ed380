"""A recipe file that merges the experts of one model.

    model: org/mixtral
    experts: {keep: 4, form: remapped}
    calibration: {text: book.txt, count: 256}
    seed: 0

Turns it into the problem that `merge_experts` is given. Knows nothing of how experts are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from evomerge.calibration.entries import CalibrationSpec
from evomerge.calibration.load import load_calibration
from evomerge.calibration.request import tokenizer_of
from evomerge.checkpoints.adapted import open_models
from evomerge.documents import read_yaml
from evomerge.errors import SpecError
from evomerge.merging.structure.experts.export import ExpertProblem
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.spec import locate, nearest, problems

_KEYS = ("model", "experts", "calibration", "seed")
_MODEL = "model"


def wants_experts(path: Path) -> bool:
    """Whether a recipe file merges the experts of one model. A list under `experts` is something
    else: dense models that are to become experts."""
    document = read_yaml(path)
    if not isinstance(document, Mapping) or "experts" not in document:
        return False
    return not isinstance(document["experts"], list)


def open_expert_problem(path: Path, *, device: str) -> ExpertProblem:
    """The model opened, the data tokenised. Raises SpecError with every problem of the file,
    UserError for a model or data that cannot be had."""
    document = read_yaml(path)
    assert isinstance(document, Mapping)  # as wants_experts has found
    folder = path.resolve().parent
    faults = [f"{key}: unknown{nearest(str(key), _KEYS)}" for key in document if key not in _KEYS]
    model, seed = document.get("model"), document.get("seed", 0)
    if not isinstance(model, str):
        faults.append("model: expected the path or name of one model with experts")
    if type(seed) is not int:
        faults.append(f"seed: expected a whole number, got {seed!r}")
    settings = _settings(document["experts"], faults)
    calibration = _calibration(document.get("calibration"), folder, faults)
    if faults or settings is None or calibration is None:
        raise SpecError(str(path), faults)
    place = locate(str(model), folder) or str(model)
    opened = open_models([place])[place]
    loaded = load_calibration(calibration, [_MODEL], tokenizer_of(opened), seed=seed)
    words = loaded.described[_MODEL]
    return ExpertProblem(opened, loaded.of(_MODEL), settings, words, seed, device)


def _calibration(document: object, folder: Path, faults: list[str]) -> CalibrationSpec | None:
    if isinstance(document, Mapping):
        return CalibrationSpec.read(document, [_MODEL], folder, faults)
    found = "nothing" if document is None else repr(document)
    faults.append(f"calibration: expected {{task: NAME}} or {{text: FILE}}, got {found}")
    return None


def _settings(document: object, faults: list[str]) -> ExpertSettings | None:
    if not isinstance(document, Mapping):
        found = "nothing" if document is None else repr(document)
        expected = "settings such as {keep: 4}, or a list of models"
        faults.append(f"experts: expected {expected}, got {found}")
        return None
    try:
        return ExpertSettings.model_validate(document)
    except ValidationError as error:
        faults.extend(problems(error, ExpertSettings, "experts"))
        return None
