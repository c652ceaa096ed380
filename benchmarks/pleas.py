"""PLeaS of two small networks trained apart, on other data: ResNets and ViTs, five seeds.

    python benchmarks/pleas.py --folder FOLDER [--output docs/results-pleas.md]
        [--kinds ResNet ViT] [--seeds 0 1 2 3 4] [--trials 60]

FOLDER keeps the trained networks and what was measured, so that an interrupted run goes on where it
was, and kinds or seeds may be measured by several processes; take a new one after a change of a
method. Some thirty minutes on a core, ten of them training. Without --output the page is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from pleas_merges import Merges
from pleas_page import Measured, page

KINDS = ("ResNet", "ViT")
TRIALS = 60


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each search")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = measured_page(arguments.kinds, arguments.seeds, arguments.folder, arguments.trials)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def measured_page(
    kinds: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    trials: int,
    *,
    epochs: int | None = None,
) -> str:
    """The whole of docs/results-pleas.md."""
    found = {kind: [measured(kind, seed, folder, trials, epochs) for seed in seeds]
             for kind in kinds}  # fmt: skip
    return page(found, trials)


def measured(kind: str, seed: int, folder: Path, trials: int, epochs: int | None) -> Measured:
    """Everything on the networks of one seed."""
    print(f"{kind}, seed {seed}", file=sys.stderr, flush=True)
    merges = Merges(kind, seed, folder, epochs)
    return Measured(
        seed,
        merges.baselines(),
        merges.at_one(),
        merges.curve(),
        merges.sizes(),
        merges.other_data(),
        merges.search(trials),
    )


if __name__ == "__main__":
    sys.exit(main())
