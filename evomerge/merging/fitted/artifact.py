"""An artifact: what a fit learned, with its provenance, as a folder of safetensors and JSON.

Knows nothing of what the tensors mean: the fit that wrote them and the merge method that applies
them do.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import evomerge
from evomerge.checkpoints.digest import combine, tensor_digest
from evomerge.errors import CheckpointError, MergeError
from evomerge.merging.aside import Aside, check_free, flush, written_aside
from evomerge.merging.recipe import Recipe

DOCUMENT = "artifact.json"
TENSORS = "artifact.safetensors"
_VERSION = 1
_PART = "artifact-{}.safetensors"
_STATE = "fit-{}.safetensors"


@dataclass(frozen=True)
class Provenance:
    """What an artifact was fitted on: `base` and `sources` by name as digests of their contents.

    `calibration` is the data's digest, `counts` how many examples each source had, `items` the
    content hashes of what they were made from, sorted, each once.
    """

    kind: str
    base: str | None
    sources: Mapping[str, str]
    calibration: str
    counts: Mapping[str, int]
    described: Mapping[str, str]
    settings: Mapping[str, Any]
    seed: int
    items: Sequence[str] = field(default_factory=list)

    @property
    def purpose(self) -> str:
        """Two fits of one purpose compute the same, so that one may go on with the other's work."""
        return json.dumps({"version": _VERSION, **self._known}, sort_keys=True)

    def differences(self, other: Provenance) -> list[str]:
        """What the two were fitted on that is not the same."""
        theirs = other._known
        return [key for key, value in self._known.items() if value != theirs[key]]

    @property
    def _known(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "described"}


class Artifact:
    """An artifact on disk. `facts` is what the fit found out that is no tensor (JSON); `cost` what
    it took: `seconds` and `flops`, which no digest counts.
    """

    def __init__(self, folder: Path, document: Mapping[str, Any]) -> None:
        self.folder = folder
        self.provenance = Provenance(**document["provenance"])
        self.facts: Mapping[str, Any] = document["facts"]
        self.cost: Mapping[str, float] = document["cost"]
        self.digest: str = document["digest"]
        files: list[Any] = [safe_open(folder / f, framework="pt") for f in document["files"]]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self.names = frozenset(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def tensor(self, name: str) -> Tensor:
        """One of its tensors. Raises CheckpointError if it has none of that name."""
        if name not in self.names:
            raise CheckpointError(
                f"{self.folder}: no tensor {name!r}; it was fitted on models with other tensors"
            )
        tensor: Tensor = self._files[name].get_tensor(name)  # mapped, not read
        return tensor

    def check_models(self, recipe: Recipe) -> None:
        """Raise MergeError if it was fitted on other models than the recipe's, as far as the recipe
        knows their digests."""
        known = self.provenance
        base = recipe.base.digest if recipe.base else None
        if base is not None and known.base is not None and base != known.base:
            raise MergeError(f"{self.folder}: was fitted on another base than the recipe's")
        names = {source.name for source in recipe.sources}
        if names != known.sources.keys():
            raise MergeError(
                f"{self.folder}: was fitted on the sources {', '.join(sorted(known.sources))};"
                f" the recipe has {', '.join(sorted(names))}"
            )
        for source in recipe.sources:
            if source.model.digest not in (None, known.sources[source.name]):
                raise MergeError(
                    f"{self.folder}: source {source.name!r} was another model when it was fitted;"
                    " fit it again"
                )

    def check_contents(self) -> None:
        """Raise CheckpointError if its tensors are not those that were written."""
        tensors = {name: tensor_digest(name, self.tensor(name)) for name in self.names}
        if self.digest != _digest(self.provenance, self.facts, tensors):
            raise CheckpointError(f"{self.folder}: damaged; fit it again")


def open_artifact(path: str | Path) -> Artifact:
    """An artifact's folder, opened. Raises CheckpointError for anything else."""
    folder = Path(path)
    try:
        stamp = os.stat(folder / DOCUMENT).st_mtime_ns
    except OSError:
        raise CheckpointError(
            f"{folder}: no artifact of a fit (no {DOCUMENT}); `evomerge fit` makes one"
        ) from None
    return _open(folder, stamp)


@lru_cache(maxsize=8)
def _open(folder: Path, stamp: int) -> Artifact:
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        if document["version"] != _VERSION:
            raise CheckpointError(
                f"{folder}: version {document['version']} of artifacts, this evomerge"
                f" reads version {_VERSION}; fit it again"
            )
        return Artifact(folder, document)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged ({error}); fit it again") from error


class Draft:
    """An artifact in the making: what is saved survives a crash.

    `state` is what the last `save` of an earlier attempt at the same fit left: tensors by name, and
    notes; None for a fit that begins. `kept` are the notes of the parts that are finished, by their
    names. `flops` are those of this attempt; a draft adds up the attempts, and their seconds.
    """

    def __init__(self, aside: Aside, provenance: Provenance) -> None:
        self._aside = aside
        self._provenance = provenance
        self._started_s = time.perf_counter()
        self._before = {"seconds": 0.0, "flops": 0.0}
        self.state = self._read()

    @property
    def kept(self) -> dict[str, Any]:
        """The notes of each part kept so far, by its name."""
        notes = self._aside.finished
        return {notes[file]["part"]: notes[file]["notes"] for file in self._files(_PART)}

    def keep(
        self,
        part: str,
        tensors: Mapping[str, Tensor],
        notes: Mapping[str, Any],
        *,
        flops: float,
    ) -> None:
        """Write a part of the artifact that is final, so that nothing writes it again.

        What was saved before is dropped: it belonged to the part.
        """
        name = _PART.format(len(self.kept) + 1)
        digests = _write(tensors, self._aside.folder / name)
        note = {"part": part, "notes": dict(notes), "digests": digests, "cost": self._cost(flops)}
        self._aside.finish(name, note)
        for old in self._files(_STATE):
            self._aside.drop(old)

    def part(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part that is kept."""
        notes = self._aside.finished
        (file,) = (name for name in self._files(_PART) if notes[name]["part"] == part)
        found: dict[str, Tensor] = load_file(self._aside.folder / file)
        return found

    def save(
        self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], *, flops: float
    ) -> None:
        """Keep how far the fit has come, in place of what was saved before."""
        before = self._files(_STATE)
        number = 1 + max((int(n.split("-")[1].split(".")[0]) for n in before), default=0)
        name = _STATE.format(number)
        save_file({key: t.contiguous() for key, t in tensors.items()}, self._aside.folder / name)
        flush(self._aside.folder / name)
        self._aside.finish(name, {"notes": dict(notes), "cost": self._cost(flops)})
        for old in before:
            self._aside.drop(old)

    def finish(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, flops: float
    ) -> None:
        """Write the artifact itself: these tensors, and those of the parts that are kept."""
        digests = _write(tensors, self._aside.folder / TENSORS)
        parts = self._files(_PART)
        for file in parts:
            digests |= self._aside.finished[file]["digests"]
        document = {
            "version": _VERSION,
            "files": [TENSORS, *parts],
            "evomerge": evomerge.__version__,
            "digest": _digest(self._provenance, facts, digests),
            "provenance": self._provenance.__dict__,
            "facts": dict(facts),
            "cost": self._cost(flops),
        }
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        (self._aside.folder / DOCUMENT).write_text(text + "\n", encoding="utf-8")
        flush(self._aside.folder / DOCUMENT)
        for old in self._files(_STATE):
            self._aside.drop(old)

    def _files(self, form: str) -> list[str]:
        start = form.split("{}")[0]
        return [name for name in self._aside.finished if name.startswith(start)]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self._aside.finished:
            return None
        self._before = list(self._aside.finished.values())[-1]["cost"]
        if not (states := self._files(_STATE)):
            return None
        name = states[-1]
        return load_file(self._aside.folder / name), self._aside.finished[name]["notes"]

    def _cost(self, flops: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._started_s
        return {
            "seconds": self._before["seconds"] + seconds,
            "flops": self._before["flops"] + flops,
        }


@contextmanager
def draft(directory: Path, provenance: Provenance, needed_bytes: int = 0) -> Iterator[Draft]:
    """An artifact that takes its place at `directory` if the block succeeds.

    An attempt that was killed or interrupted is gone on with; an error leaves nothing. Raises
    ExportError where `directory` is taken or cannot be written.
    """
    check_free(directory)
    with written_aside(directory, provenance.purpose, needed_bytes) as aside:
        yield Draft(aside, provenance)


def _write(tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Write tensors to the disk; the digest of each."""
    owned = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(owned, path)
    flush(path)
    return {name: tensor_digest(name, tensor) for name, tensor in owned.items()}


def _digest(provenance: Provenance, facts: Mapping[str, Any], tensors: Mapping[str, str]) -> str:
    text = json.dumps([provenance.purpose, facts], sort_keys=True, separators=(",", ":"))
    return combine(hashlib.sha256(text.encode()).digest(), tensors)
