"""docs/results.md as text: the table of all methods, what it says, the settings chosen.

Knows nothing of how anything was measured.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from method_grids import LEFT_OUT
from zoo_scores import EXAMPLES, TASKS, WEIGHTS, ZooScores

import evomerge
from evomerge.merging.fitted.registry import FITTERS
from evomerge.merging.methods.registry import METHODS
from evomerge.scoring.statistics import Comparison, compare, holm
from evomerge.trial import Score, weighted_mean

UNIFORM, ARITHMETIC, DAM = "linear (uniform average)", "task_arithmetic", "dam (tuned)"
ALPHA = 0.05
_COLUMNS = (
    "mean ± s.e.",
    "over task arithmetic",
    "p (Holm)",
    "needs",
    "tried",
    "fit s",
    "fit FLOPs",
    "merge ms",
)


@dataclass(frozen=True)
class Chosen:
    """A method on one zoo: the settings that were chosen, and what they gave on report items.

    `tried` counts the settings scored to choose them, `fits` the fits made for it. Seconds and
    FLOPs are of the chosen one.
    """

    report: Score
    settings: str = ""
    tried: int = 0
    fits: int = 0
    fit_s: float | None = None
    merge_s: float | None = None
    flops: float | None = None

    @property
    def mean(self) -> float:
        return weighted_mean({name: self.report.tasks[name].value for name in TASKS}, WEIGHTS)


Row = Sequence[Chosen]  # by seed


def page(rows: Mapping[str, Row], scores: Sequence[ZooScores]) -> str:
    """The whole of docs/results.md."""
    seeds = [one.seed for one in scores]
    against = comparisons(rows, ARITHMETIC)
    ranked = sorted(rows, key=lambda name: -mean(rows[name]))
    items = sum(rows["base"][0].report.tasks[task].n for task in TASKS)
    evaluation_s = statistics.fmean(one.evaluation_seconds() for one in scores)
    return "\n".join(
        [
            *introduction(seeds, items, scores[0].chosen_on, evaluation_s),
            "",
            *table(
                ["", *(f"seed {seed}" for seed in seeds), *_COLUMNS],
                "---:",
                [line(name, rows[name], against.get(name)) for name in ranked],
            ),
            "",
            *notes(rows, against, seeds),
            "",
            "## Settings chosen",
            "",
            *table(
                ["", *(f"seed {seed}" for seed in seeds)],
                "---",
                [
                    [name, *(one.settings or "defaults" for one in rows[name])]
                    for name in ranked
                    if rows[name][0].tried
                ],
            ),
            "",
            "## Left out",
            "",
            *(f"- `{name}` {reason}." for name, reason in LEFT_OUT.items()),
            "",
        ]
    )


def introduction(
    seeds: Sequence[int], items: int, chosen_on: int, evaluation_s: float
) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm_eval"))
    return f"""\
# Every merge method on the zoo

Mean accuracy over the zoo's four tasks ({", ".join(TASKS)}) of a base, its four
experts, and what each [method](methods) makes of them, at the best settings of a small grid.
Written by

```sh
evomerge demo --dir FOLDER --seed 0    # and 1, 2: the zoos, and the search that has a row
python benchmarks/methods_table.py FOLDER
```

with evomerge {evomerge.__version__}, {packages}, Python {platform.python_version()},
in float32 with one thread. The grids stand in `benchmarks/method_grids.py`.

**Protocol.** {len(seeds)} zoos, each trained with a seed of its own (`evomerge zoo build --seed
N`). Items are split as in a study: 40% search, 20% selection, 40% report. Fits see {EXAMPLES}
search items of each task: prompts with their right answers, which a fit that needs no labels reads
as text. Every setting is scored on selection items, and the three best of a row on search items
too, without those that fits have seen ({chosen_on} items at seed {seeds[0]}). The numbers are of
the report items ({items} at seed {seeds[0]}), which neither fits nor the choice of a setting have
seen. Weights of sources are equal in every grid: to vary them is what the search is for. Random
masks are one draw.

**The grids have seen more.** They were drawn up on these zoos, and *tried* counts their last form
only. λ of most methods, and densities of sce and pcb, were moved after a look at selection scores
of seed 0, when report means of finished rows were on the screen already. After a first whole table,
report items included, more of adamerging's settings, 24 epochs of dam (tuned) and one λ of
consensus_ties were added. That table had dam (tuned) at 0.921, adamerging at 0.810 (KL), 0.737
(entropy) and 0.684 (++), consensus_ties at 0.700, and could not tell adamerging (entropy) from task
arithmetic (p 0.56): take its place below as a hint. dam's defaults and the settings of its tuned
row are from its page, chosen on selection items of seeds 0 and 1; the first rate of adamerging (KL)
and the alignment of sens_merging are from their pages, which show report items. Zoos of other seeds
would be the test of all this; none has been run.

**Columns.** The standard error is over seeds: how much the zoo matters. *Over task arithmetic* is
the difference to the best task arithmetic on the same items, all seeds together, with its 95%
interval; p is of the paired sign-flip test after Holm's correction over all rows: how much the
items matter, for these zoos. *Tried* counts the settings scored (and fits made) to choose one;
scoring takes {evaluation_s:.1f} s each. Seconds and FLOPs are those of the chosen fit and merge
alone, means over seeds: CPU seconds of one thread, of a search the wall seconds of its trials. A
fit's FLOPs are those of its forward and backward passes.
dam (tuned) is around the base and needs it.
""".splitlines()


def table(head: Sequence[str], rule: str, body: Sequence[Sequence[str]]) -> list[str]:
    rules = ["---", *(rule for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *body)]


def line(name: str, row: Row, against: Comparison | None) -> list[str]:
    first = row[0]
    fits = f" ({first.fits} fit{'s' * (first.fits > 1)})" if first.fits else ""
    return [
        name,
        *(f"{one.mean:.3f}" for one in row),
        f"{mean(row):.3f} ± {error(row):.3f}",
        difference(against) if against else "",
        chance(against.p_adjusted) if against else "",
        needs(name.split(" ")[0]),
        f"{first.tried}{fits}" if first.tried else "",
        averaged(row, lambda one: one.fit_s, "{:.1f}"),
        averaged(row, lambda one: one.flops or None, "{:.1e}"),
        averaged(row, lambda one: one.merge_s and 1000 * one.merge_s, "{:.0f}"),
    ]


def chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def difference(found: Comparison) -> str:
    low, high = found.interval
    return f"{found.difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def needs(method: str) -> str:
    """What a method wants beside its sources."""
    if method not in METHODS:
        return "base, labels" if method == "search" else ""
    wanted = ["base"] if METHODS[method].needs_base else []
    if kind := METHODS[method].artifact:
        fitter = FITTERS[kind]
        wanted += ["labels" if fitter.needs_labels else "data"]
        wanted += ["gradients"] if fitter.needs_gradients else []
    return ", ".join(wanted)


def averaged(row: Row, value: Callable[[Chosen], float | None], form: str) -> str:
    found = [number for one in row if (number := value(one)) is not None]
    return form.format(statistics.fmean(found)) if found else ""


def mean(row: Row) -> float:
    return statistics.fmean(one.mean for one in row)


def error(row: Row) -> float:
    """The standard error over seeds; nan for one seed."""
    means = [one.mean for one in row]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def comparisons(rows: Mapping[str, Row], reference: str) -> dict[str, Comparison]:
    """Every row against one of them, on the report items of all seeds together."""
    joined = {name: joint(row) for name, row in rows.items()}
    weights = dict.fromkeys(joined[reference].tasks, 1.0)
    found = {
        name: compare(score, joined[reference], weights)
        for name, score in joined.items()
        if name != reference
    }
    adjusted = holm([one.p_value for one in found.values()])
    return {
        name: replace(one, p_adjusted=p)
        for (name, one), p in zip(found.items(), adjusted, strict=True)
    }


def joint(row: Row) -> Score:
    return Score(
        {
            f"{task} {place}": result
            for place, one in enumerate(row)
            for task, result in one.report.tasks.items()
        }
    )


def notes(
    rows: Mapping[str, Row], against: Mapping[str, Comparison], seeds: Sequence[int]
) -> Iterator[str]:
    """What the table says, in words."""
    tried = {name: one for name, one in against.items() if rows[name][0].tried}
    better = [name for name, one in tried.items() if one.is_improvement(ALPHA)]
    noise = [name for name, one in tried.items() if one.p_adjusted >= ALPHA]
    worse = [name for name in tried if name not in better and name not in noise]
    yield "## What it says"
    yield ""
    yield f"- Better than the best task arithmetic, beyond chance: {listed(better)}."
    yield f"- No difference shown, whatever the sign of their means: {listed(noise)}."
    yield f"- Worse: {listed(worse)}."
    yield f"- {dam_note(rows, seeds)}"


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def dam_note(rows: Mapping[str, Row], seeds: Sequence[int]) -> str:
    """Whether DAM beats the uniform average, seed by seed."""
    found = [
        compare(ours.report, theirs.report, WEIGHTS)
        for ours, theirs in zip(rows[DAM], rows[UNIFORM], strict=True)
    ]
    won = sum(one.is_improvement(ALPHA) for one in found)
    each = "; ".join(
        f"seed {seed}: {difference(one)}, p {chance(one.p_value)}"
        for seed, one in zip(seeds, found, strict=True)
    )
    return f"DAM beats uniform averaging on {won} of {len(seeds)} seeds ({each})."
