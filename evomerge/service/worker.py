"""One worker: a resident model and prepared tasks, scoring one recipe after another.

Used by every executor; JSON in, JSON out, so that it runs the same in a subprocess and in a Ray
actor. Knows nothing of stores, samplers and retries. torch is imported when it is first needed.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from evomerge.errors import InfrastructureError, NonFiniteModel, VersionMismatch
from evomerge.merging.recipe import Recipe
from evomerge.service.wire import failure_of
from evomerge.spec import StudySpec

if TYPE_CHECKING:
    from evomerge.scoring.resident import ResidentScorer
    from evomerge.service.resident import Resident
    from evomerge.trial import Score


class Worker:
    """Scores recipes on one device. The model is loaded at the first job and stays."""

    def __init__(self, name: str | None = None, *, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called whenever a job gets on: after every forward pass, and often."""
        self._beat = beat
        self.name = name or f"{socket.gethostname()}:{os.getpid()}"
        self._spec: StudySpec | None = None
        self._places: dict[str, str] = {}
        self._dtype = self._device = ""
        self._devices: list[str] = []
        self._resident: Resident | None = None

    def inspect(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Check a spec against its checkpoints and tasks. Raises UserError with every problem."""
        from evomerge.service.inspection import inspect

        limit_threads(spec)
        checked = StudySpec.model_validate(spec)
        return inspect(checked, device_of(checked.evaluation.device))

    def prepare(
        self,
        spec: Mapping[str, Any],
        digests: Mapping[str, str],
        dtype: str,
        fingerprint: Mapping[str, Any] = {},
    ) -> None:
        """Say what will be scored (see Setup); the heavy part is put off to the first job.

        Raises VersionMismatch where this worker is not like the one that inspected the study.
        """
        different = differences(fingerprint, spec["evaluation"]["device"])
        if different:
            raise VersionMismatch(
                f"worker {self.name} would score otherwise: {'; '.join(different)}; "
                "give every worker what the study was started with"
            )
        limit_threads(spec)
        self._spec = StudySpec.model_validate(spec)
        self._places = {digest: path for path, digest in digests.items()}
        self._dtype = dtype
        self._devices = devices_of(spec["evaluation"]["device"], spec["workers"]["num_gpus"])
        self._device = self._devices[0]
        self._resident = None

    def run(self, token: str, recipe: Mapping[str, Any], part: str) -> dict[str, Any]:
        """Materialise and score; the JSON of an Event. Never raises what a candidate can cause."""
        seconds: dict[str, float] = {}
        notes: list[str] = []
        event: dict[str, Any] = {"token": token, "worker": self.name, "seconds": seconds}
        event["notes"] = notes
        try:
            return {**event, "score": self._score(Recipe.from_json(recipe), part, seconds, notes)}
        except Exception as error:  # whatever a candidate or a library raises is data
            return {**event, **failure_of(error)}

    def _score(
        self, recipe: Recipe, part: Any, seconds: dict[str, float], notes: list[str]
    ) -> dict[str, Any]:
        from evomerge.scoring.room import twice

        started = time.perf_counter()
        located = recipe.located(self._places)
        resident = self._loaded()
        live = twice(lambda: resident.fitting(located), "the candidate's model", self._device)
        write, scorer = live
        loaded = time.perf_counter()
        self._beat()
        twice(write, "merging into the model", self._device)
        written = time.perf_counter()
        self._beat()
        score = self._fitted(scorer, part, notes)
        seconds["load"] = loaded - started
        seconds["materialise"] = written - loaded
        seconds["score"] = time.perf_counter() - written
        for name, task in score.tasks.items():
            if not math.isfinite(task.value):
                raise NonFiniteModel(f"task {name}: {task.metric} is {task.value}")
        return score.to_json()

    def _fitted(self, scorer: ResidentScorer, part: Any, notes: list[str]) -> Score:
        """The score; a batch that had to shrink for it is noted."""
        before = scorer.fitting_batch_size
        try:
            return scorer.score(part)
        finally:
            if scorer.fitting_batch_size < before:
                notes.append(
                    f"{self._device} ran out of memory with a batch of {before}; this worker "
                    f"goes on with {scorer.fitting_batch_size}"
                )

    def _loaded(self) -> Resident:
        from evomerge.service.resident import Resident

        if self._spec is None:
            raise RuntimeError("Worker.run before Worker.prepare")
        if self._resident is None:
            self._resident = Resident(self._spec, self._dtype, self._devices, self._beat)
        return self._resident


def differences(fingerprint: Mapping[str, Any], device: str) -> list[str]:
    """What is not here as a scorer's fingerprint has it: its libraries, Python, kind of device.

    What else it holds follows from the spec; see `evomerge.scoring.fingerprint`.
    """
    if not fingerprint:
        return []
    here = {name: _version(name) for name in fingerprint["packages"]}
    here["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    here["device"] = device_of(device).partition(":")[0]
    study = {**fingerprint["packages"], **fingerprint}
    return [
        f"{name} is {here[name]} here and {study[name]} in the study"
        for name in here
        if here[name] != study[name]
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def device_of(wanted: str) -> str:
    """The device to run on: `auto` is CUDA where there is one."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def devices_of(wanted: str, num_gpus: float) -> list[str]:
    """The devices that a worker's model lies on: several where it has several GPUs.

    Raises InfrastructureError where there are fewer.
    """
    device = device_of(wanted)
    if num_gpus < 2 or device != "cuda":
        return [device]
    import torch

    here = torch.cuda.device_count()
    if here < num_gpus:
        raise InfrastructureError(
            f"`workers.num_gpus` is {num_gpus:g}, and this worker sees {here} GPUs"
        )
    return [f"cuda:{number}" for number in range(int(num_gpus))]


def limit_threads(spec: Mapping[str, Any]) -> None:
    """As many threads as CPUs granted: more of them spin and cost many times the work."""
    import torch

    torch.set_num_threads(int(spec["workers"]["num_cpus"]))
