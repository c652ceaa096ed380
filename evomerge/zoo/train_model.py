"""Train one model of a zoo and put its folder in place; also the program of a training process.

`python -m evomerge.zoo.train_model DIR NAME` reads the recipe and the seed from `DIR/zoo.json`
and prints the fraction done, a number a line. A process of its own, rather than a fork, so that
two experts train at once whatever the caller has loaded; when the builder dies, the next number
finds a closed pipe and the process ends.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.zoo.recipe import ZooRecipe
from evomerge.zoo.training import OnStep, save_checkpoint, train_base, train_expert


def train_model(
    directory: Path, name: str, *, recipe: ZooRecipe, seed: int, on_step: OnStep
) -> None:
    """Train `name` (`base` or an expert) and write `DIR/NAME`, aside first and then renamed."""
    with _quiet_transformers():
        if name == "base":
            model = train_base(recipe, seed, on_step)
        else:
            model = train_expert(recipe, seed, name, directory / "base", on_step)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=directory))
        try:
            save_checkpoint(model, recipe, aside)
            aside.chmod(0o755)  # mkdtemp's folder is for its owner alone
            # There already if a build was cut off before its manifest said so.
            shutil.rmtree(directory / name, ignore_errors=True)
            aside.rename(directory / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def main() -> None:
    """Train the model that the command line names."""
    directory, name = Path(sys.argv[1]), sys.argv[2]
    manifest = json.loads((directory / "zoo.json").read_text())
    train_model(
        directory,
        name,
        recipe=ZooRecipe.from_json(manifest["recipe"]),
        seed=manifest["seed"],
        on_step=lambda fraction: print(f"{fraction:.4f}", flush=True),
    )


if __name__ == "__main__":
    main()
