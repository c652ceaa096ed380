"""Build a zoo: the base, then the experts two at a time, then the tasks; resume, reuse, report.

Knows nothing of how a model is trained, and does not import torch before one has to be.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.zoo.manifest import Manifest, open_manifest, weights_digest
from evomerge.zoo.recipe import ZooRecipe
from evomerge.zoo.tasks import write_tasks


@dataclass(frozen=True)
class ZooProgress:
    """How far a build is: `fraction` in [0, 1]; `seconds_left` is None until it can be guessed."""

    stage: str
    fraction: float
    seconds_left: float | None


@dataclass(frozen=True)
class ZooPaths:
    """Where the parts of a zoo lie; `sources` maps an expert's name to its checkpoint."""

    directory: Path
    base: Path
    sources: Mapping[str, Path]
    tasks: Path


OnProgress = Callable[[ZooProgress], None]


def build_zoo(
    directory: Path,
    *,
    seed: int = 0,
    progress: OnProgress | None = None,
    recipe: ZooRecipe | None = None,
    processes: int = 2,
) -> ZooPaths:
    """Build the zoo of `seed` in `directory`, or what is missing of it, and return its paths.

    A finished model is reused; an interrupted build goes on with the model where it was and gives
    the same bits. Tasks are rewritten where the folder was moved. With `processes` 1 everything
    is trained in this process. Raises UserError where the folder holds something else.
    """
    recipe = recipe or ZooRecipe()
    manifest = open_manifest(directory, recipe=recipe, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    manifest.write(directory)
    work = _work(recipe)
    meter = _Meter(work, set(manifest.models), progress)
    builder = _Builder(directory, recipe, manifest, meter)
    builder.train(["base"], processes)
    builder.train(list(recipe.experts), processes)
    write_tasks(directory / "tasks", recipe=recipe, seed=seed)
    meter.finish()
    return ZooPaths(
        directory=directory,
        base=directory / "base",
        sources={name: directory / name for name in recipe.experts},
        tasks=directory / "tasks",
    )


def _work(recipe: ZooRecipe) -> dict[str, float]:
    """Return the expected steps of each model; every step costs about the same."""
    experts = {name: float(expert.steps) for name, expert in recipe.experts.items()}
    return {"base": float(recipe.base.expected_steps)} | experts


def _remove_leftovers(directory: Path) -> None:
    for path in directory.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


class _Builder:
    """Trains models and records each in the manifest as it is finished."""

    def __init__(
        self, directory: Path, recipe: ZooRecipe, manifest: Manifest, meter: _Meter
    ) -> None:
        self._directory = directory
        self._recipe = recipe
        self._manifest = manifest
        self._meter = meter

    def train(self, names: list[str], processes: int) -> None:
        missing = [name for name in names if name not in self._manifest.models]
        missing.sort(key=self._meter.work_of, reverse=True)  # the longest first ends soonest
        if processes == 1 or len(missing) < 2:
            for name in missing:
                self._train_here(name)
                self._record(name)
        else:
            self._train_apart(missing, processes)

    def _train_here(self, name: str) -> None:
        from evomerge.zoo.train_model import train_model

        train_model(
            self._directory,
            name,
            recipe=self._recipe,
            seed=self._manifest.seed,
            on_step=lambda fraction: self._meter.advance(name, fraction),
        )

    def _train_apart(self, names: list[str], processes: int) -> None:
        running = _Running()
        with ThreadPoolExecutor(processes) as pool:
            waiting = {pool.submit(self._run_process, name, running): name for name in names}
            try:
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        future.result()
                        self._record(waiting.pop(future))
            finally:
                running.stop()

    def _run_process(self, name: str, running: _Running) -> None:
        command = [sys.executable, "-m", "evomerge.zoo.train_model", str(self._directory), name]
        process = running.start(command)
        if process is None:
            return
        output = []
        with process:
            for line in process.stdout or ():
                try:
                    self._meter.advance(name, float(line))
                except ValueError:
                    output.append(line)
        if process.returncode != 0:
            raise EvomergeError(
                f"training the zoo's {name!r} ended with exit code {process.returncode}:\n"
                + "".join(output[-20:])
            )

    def _record(self, name: str) -> None:
        digest = weights_digest(self._directory / name)
        self._manifest = self._manifest.with_model(name, digest)
        self._manifest.write(self._directory)


@dataclass
class _Running:
    """The training processes that run now; after `stop` no other is started."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, command: list[str]) -> subprocess.Popen[str] | None:
        with self.lock:
            if self.stopped:
                return None
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self.processes.append(process)
            return process

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()


class _Meter:
    """Adds up the work done and guesses the time left from the pace of this call."""

    def __init__(
        self, work: dict[str, float], finished: set[str], progress: OnProgress | None
    ) -> None:
        self._work = work
        self._done = {name: 1.0 if name in finished else 0.0 for name in work}
        self._progress = progress
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._reused = self._fraction()

    def work_of(self, name: str) -> float:
        return self._work[name]

    def advance(self, name: str, fraction: float) -> None:
        with self._lock:
            self._done[name] = fraction
            self._report(f"training {name}")

    def finish(self) -> None:
        self._report("done")

    def _report(self, stage: str) -> None:
        if self._progress is None:
            return
        fraction = self._fraction()
        fresh = fraction - self._reused
        elapsed = time.monotonic() - self._started
        left = elapsed * (1.0 - fraction) / fresh if fresh > 0 else None
        self._progress(ZooProgress(stage, fraction, 0.0 if fraction == 1.0 else left))

    def _fraction(self) -> float:
        done = sum(self._work[name] * fraction for name, fraction in self._done.items())
        return done / sum(self._work.values())
