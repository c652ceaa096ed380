"""`zoo.json`: which seed and recipe a folder's zoo has, and the digest of each finished model.

Knows nothing of training. It is written before the first model, so an interrupted build is
known for what it is, and again after each one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evomerge.errors import CheckpointError, UserError
from evomerge.zoo.recipe import RECIPE_VERSION, ZooRecipe

_NAME = "zoo.json"


@dataclass(frozen=True)
class Manifest:
    """What a zoo's folder holds; `models` maps a finished model to its weights' SHA-256."""

    seed: int
    recipe: dict[str, Any]
    recipe_version: int = RECIPE_VERSION
    models: dict[str, str] = field(default_factory=dict)

    def with_model(self, name: str, digest: str) -> Manifest:
        """Return the manifest with the model `name` finished."""
        return replace(self, models=dict(sorted((self.models | {name: digest}).items())))

    def write(self, directory: Path) -> None:
        """Write aside, then rename: a reader never sees half a manifest."""
        aside = directory / f".{_NAME}.partial"
        aside.write_text(json.dumps(self.__dict__, indent=2) + "\n")
        aside.replace(directory / _NAME)


def open_manifest(directory: Path, *, recipe: ZooRecipe, seed: int) -> Manifest:
    """Return the manifest of the zoo in `directory`, a new one where there is nothing yet.

    Raises UserError where the folder holds another zoo or files that are not a zoo's, and
    CheckpointError where a finished model was changed since.
    """
    wanted = Manifest(seed=seed, recipe=recipe.to_json())
    path = directory / _NAME
    if not path.exists():
        _refuse_foreign(directory)
        return wanted
    found = _read(path)
    _refuse_other_zoo(directory, found, wanted)
    return replace(found, models=_finished(directory, found.models))


def weights_digest(model_directory: Path) -> str:
    """Return the SHA-256 of a model's `model.safetensors`, as hexadecimal digits."""
    return hashlib.sha256((model_directory / "model.safetensors").read_bytes()).hexdigest()


def _read(path: Path) -> Manifest:
    try:
        return Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as problem:
        raise UserError(
            f"{path}: not a manifest this version can read ({problem}); "
            f"build the zoo in another folder or delete this one"
        ) from problem


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: is a file; name a folder that is empty or does not exist")
    names = sorted(path.name for path in directory.iterdir() if path.name != f".{_NAME}.partial")
    if names:
        raise UserError(
            f"{directory}: holds {names[0]!r} but no {_NAME}, so it is not a zoo; "
            f"name a folder that is empty or does not exist"
        )


def _refuse_other_zoo(directory: Path, found: Manifest, wanted: Manifest) -> None:
    way_out = "build in another folder or delete this one"
    if found.seed != wanted.seed:
        raise UserError(
            f"{directory}: holds the zoo of seed {found.seed}, not of seed {wanted.seed}; {way_out}"
        )
    if (found.recipe_version, found.recipe) != (wanted.recipe_version, wanted.recipe):
        raise UserError(
            f"{directory}: holds a zoo of another training recipe "
            f"(version {found.recipe_version}, this evomerge makes version "
            f"{wanted.recipe_version}); {way_out}"
        )


def _finished(directory: Path, models: dict[str, str]) -> dict[str, str]:
    """Return the finished models that are still there; one that was deleted is trained again."""
    present = {name: digest for name, digest in models.items() if (directory / name).exists()}
    for name, digest in present.items():
        weights = directory / name / "model.safetensors"
        if not weights.exists() or weights_digest(directory / name) != digest:
            raise CheckpointError(
                f"{weights}: is not the file that the zoo's build wrote; "
                f"delete {directory / name} and build again"
            )
    return present
