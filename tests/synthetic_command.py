"""The real command line and real worker processes, which score without models.

    python synthetic_command.py evomerge run SPEC.yaml ...
    python synthetic_command.py worker PID

What they do is steered by files in the folder that $SYNTHETIC_FOLDER names, so that no test waits
for a time. While `hold-inspect`, `hold-score` or `hold-report` is there, that part waits (a job
gives signs of life meanwhile), and `began-...` says that it has begun. A job that finds `hang-once`
takes it away and never returns; with `hang` none returns, or none of the recipe whose digest it
holds; `hung-PID` says who hangs. $SYNTHETIC_HOST is the name of this machine, $SYNTHETIC_PAGES the
most pages that an SQLite store may have.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evomerge.merging.recipe import Recipe
from evomerge.service.wire import failure_of
from evomerge.spec import StudySpec
from evomerge.testing.synthetic import synthetic_inspection, synthetic_score


class Synthetic:
    """What stands in for `evomerge.service.worker.Worker`."""

    def __init__(self, *, beat: Callable[[], None]) -> None:
        self.name = f"synthetic:{os.getpid()}"
        self._beat = beat
        self._tasks: list[str] = []
        self._folder = Path(os.environ["SYNTHETIC_FOLDER"])

    def inspect(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        wait_while(self._folder, "inspect")
        return synthetic_inspection(StudySpec.model_validate(spec))

    def prepare(self, spec: Mapping[str, Any], *_: Any, **__: Any) -> None:
        self._tasks = [task["task"] for task in spec["objective"]["tasks"]]

    def run(self, token: str, recipe: Mapping[str, Any], part: Any) -> dict[str, Any]:
        event: dict[str, Any] = {"token": token, "worker": self.name, "seconds": {}}
        try:
            read = Recipe.from_json(recipe)
            self._hang(read.digest)
            wait_while(self._folder, "score", self._beat)
            score = synthetic_score(read, part, self._tasks)
        except Exception as error:
            return {**event, **failure_of(error)}
        return {**event, "score": score.to_json()}

    def _hang(self, digest: str) -> None:
        hang = self._folder / "hang"
        hangs = hang.exists() and hang.read_text() in ("", digest)
        if hangs or taken(self._folder / "hang-once"):
            (self._folder / f"hung-{os.getpid()}").touch()
            while True:  # no signal that can be handled ends it
                time.sleep(3600)


def wait_while(folder: Path, what: str, beat: Callable[[], None] = lambda: None) -> None:
    """Wait while it is held."""
    (folder / f"began-{what}").touch()
    while (folder / f"hold-{what}").exists():
        time.sleep(0.01)
        beat()


def taken(file: Path) -> bool:
    """Whether this process took the file away."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def work() -> None:
    """Be a worker process."""
    from evomerge.service import local_worker

    local_worker.Worker = Synthetic  # type: ignore[assignment,misc]
    local_worker.main()


def control() -> None:
    """Be the command line."""
    from evomerge.cli import main, running
    from evomerge.service import local

    local._COMMAND = (sys.executable, __file__, "worker")  # type: ignore[assignment]
    folder, stored_report = Path(os.environ["SYNTHETIC_FOLDER"]), running.stored_report

    def report(*arguments: Any) -> Any:
        wait_while(folder, "report")
        return stored_report(*arguments)

    running.stored_report = report
    if "SYNTHETIC_HOST" in os.environ:
        socket.gethostname = lambda: os.environ["SYNTHETIC_HOST"]
    if "SYNTHETIC_PAGES" in os.environ:
        limit_pages(int(os.environ["SYNTHETIC_PAGES"]))
    main.main()


def limit_pages(count: int) -> None:
    """Have every SQLite database say that its disk is full beyond so many pages."""
    import sqlalchemy as sa

    @sa.event.listens_for(sa.Engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={count}")


if __name__ == "__main__":
    role = sys.argv.pop(1)
    work() if role == "worker" else control()
