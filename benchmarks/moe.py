"""Merged experts of a tiny Mixtral: M-SMoE beside simpler ways and its own variations.

    python benchmarks/moe.py --folder FOLDER [--seeds 0 1 2 3 4] [--output docs/results-moe.md]

FOLDER keeps the trained models and what was measured of them, so that an interrupted run goes on
where it was, and seeds may be measured by several processes; take a new one after a change of a
method. Every seed is a model with data of its own, in disjoint parts: what a merge looks at
(calibration), what a search chooses on (selection), what the page shows (report). Without --output
the page is printed. Some twenty minutes on a core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from moe_forms import forms
from moe_mixtral import Setup, mixtral, parts, save, trained
from moe_page import PUBLISHED, Measured, page
from moe_scores import MoeScores, Scored
from moe_search import MOVES, searched

from evomerge.merging.structure.experts.settings import ExpertSettings, Similarity

KEEPS = (6, 4, 2)  # of 8 experts
ROUNDS = 15
BASES = [base for base in get_args(Similarity) if base != "router_logits"]  # the published one
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    PUBLISHED: {},
    "aligned to the dominant": {"alignment": "dominant"},
    "aligned by activations": {"alignment_by": "activations"},
    "not aligned": {"alignment": "none"},
    "averaging (uniform weights)": {"exponent": 0.0},
    "averaging (not aligned)": {"exponent": 0.0, "alignment": "none"},
    "usage by gate mass": {"usage": "gate_mass"},
    "as many in every layer": {"allocation": "uniform"},
    "pruned (routed to the dominant)": {"method": "prune"},
    "HC-SMoE": {"method": "hc_smoe"},
    **{f"grouped by {base}": {"similarity": base} for base in BASES},
    "collapsed (pruned)": {"form": "collapsed", "method": "prune"},
    "collapsed (dominant's row)": {"form": "collapsed", "router": "dominant"},
    "collapsed (mean row)": {"form": "collapsed", "router": "mean"},
    "collapsed (least squares)": {"form": "collapsed", "router": "logsumexp"},
    "collapsed (distilled)": {"form": "collapsed", "router": "distilled"},
    "routers distilled": {"router": "distilled"},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = measured_page(Setup(), arguments.seeds, arguments.folder)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def measured_page(
    setup: Setup, seeds: Sequence[int], folder: Path, *, moves: int = MOVES, rounds: int = ROUNDS
) -> str:
    """The whole of docs/results-moe.md."""
    found = [measured(setup, seed, folder, moves) for seed in seeds]
    with tempfile.TemporaryDirectory() as scratch:
        wider = Path(scratch) / "wider"
        torch.manual_seed(0)
        save(mixtral(width=256, inner=512, layers=4), wider)
        models = {"the trained model": trained(setup, seeds[0], folder), "a wider one": wider}
        weighed = {name: forms(place, rounds) for name, place in models.items()}
    return page(setup, found, weighed, moves)


def measured(setup: Setup, seed: int, folder: Path, moves: int) -> Measured:
    """Everything on one seed's model."""
    print(f"seed {seed}", file=sys.stderr, flush=True)
    scores = MoeScores(trained(setup, seed, folder), parts(setup, seed), seed)
    return Measured(
        seed,
        scores.full("report"),
        [usage.tolist() for usage in scores.usage],
        {keep: variants(scores, keep) for keep in KEEPS},
        {keep: searched(scores, keep, moves) for keep in KEEPS},
    )


def variants(scores: MoeScores, keep: int) -> dict[str, Scored]:
    return {
        name: scores.merged(ExpertSettings.model_validate({"keep": keep, **settings}))
        for name, settings in VARIANTS.items()
    }


if __name__ == "__main__":
    sys.exit(main())
