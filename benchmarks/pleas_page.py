"""docs/results-pleas.md as text: tables of means with intervals over seeds, and what they say.

Knows nothing of how anything was measured.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from moe_page import Paired, paired
from pleas_digits import SELECTION, TRAIN
from pleas_merges import (
    ALLOCATIONS,
    BUDGETS,
    CALIBRATION,
    CURVED,
    FORMS,
    OWN,
    PERMUTED,
    PREFIX,
    PROGRAMME,
    PUBLISHED,
    REGMEAN,
    RESET,
    SEARCHED,
    SEARCHED_AT,
    SEQUENTIAL,
    SIZES,
    UNIFORM,
)
from results_page import chance, table
from scipy import stats

import evomerge
from evomerge.scoring.statistics import holm

AVERAGE, BY_WEIGHTS = "average", "permuted by weights"
ENSEMBLE = "ensemble (probabilities), twice the cost"
CLAIMS = (  # (matching, form) against (matching, form)
    ((BY_WEIGHTS, RESET), (AVERAGE, RESET)),
    ((PERMUTED, RESET), (AVERAGE, RESET)),
    ((PERMUTED, PUBLISHED), (AVERAGE, PUBLISHED)),
    ((PERMUTED, PUBLISHED), (PERMUTED, RESET)),
    ((PERMUTED, PUBLISHED), (PERMUTED, REGMEAN)),
    ((PERMUTED, SEQUENTIAL), (PERMUTED, PUBLISHED)),
    ((PERMUTED, OWN), (PERMUTED, SEQUENTIAL)),
    ((PERMUTED, OWN), (AVERAGE, OWN)),
)
STARTED = tuple(f"search from {rule}" for rule in (UNIFORM, PROGRAMME))
BETWEEN = tuple(at for at, budget in enumerate(BUDGETS) if 1.0 < budget < 2.0)


@dataclass(frozen=True)
class Measured:
    """Accuracies in percent on the networks of one seed, as `pleas_merges.Merges` gives them."""

    seed: int
    baselines: Mapping[str, float]
    at_one: Mapping[str, Mapping[str, float]]
    curve: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
    sizes: Mapping[str, Sequence[float]]
    other_data: Mapping[str, Mapping[str, float]]
    search: Mapping[str, Mapping[str, Any]]


Seeds = Sequence[Measured]


def page(found: Mapping[str, Seeds], trials: int) -> str:
    """The whole page."""
    lines = [*introduction(next(iter(found.values()))), ""]
    for kind, seeds in found.items():
        lines += [f"## {kind}s", "", *parents(seeds), "", "**At the size of one.**", ""]
        lines += [*at_one(seeds), "", *claims(seeds), "", *curve_text(), *curve(seeds), ""]
        lines += [*allocations(seeds), "", *data_text(), *sizes(seeds), "", *other_data(seeds), ""]
        lines += [*search_text(trials), *searches(seeds), ""]
    return "\n".join(lines)


def introduction(seeds: Seeds) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn"))
    return f"""\
# PLeaS: results

Two small networks trained apart from different random starts, one on scikit-learn's digits, the
other on the same digits inverted and turned by 90 degrees, in [one](guides/pleas.md). Accuracy in
percent, the mean of both domains; the label is asked for without saying which domain it is. 10 is
chance. Written by

```sh
python benchmarks/pleas.py --folder FOLDER --output docs/results-pleas.md
```

with evomerge {evomerge.__version__}, {packages}, Python {platform.python_version()}, in float32
with one thread. Nothing is trained after a merge, and no merge sees a label, but for what groups
are worth to the programme and the search.

**Protocol.** {len(seeds)} seeds, each with a split and two networks of its own: ResNets of 8 to 32
channels in four blocks with batch norms, ViTs of width 32 in three layers. Of 1797 images {TRAIN}
are for training and calibration ({CALIBRATION} of them, in both domains, unless it says otherwise),
{SELECTION} for what groups are worth and for the search to choose on, the rest is reported. ± and
brackets are 95% intervals of Student's t over seeds, differences paired by seed; p is of the same
test, after Holm's correction within a list. Images this small and networks this easy say little
about sizes of effects on large ones.

**Forms.** *As it is*: merged units averaged. *BN reset*: batch norms get the statistics of the
calibration data (no ViT has any). *Least squares (published)*: every layer refit on the mean of
what it was given in both networks. *On separate rows*: on what one was given, and then the other
(RegMean among matched units). *Sequential* (ours): on what it is given in the merged network.
*Own targets* (ours): images of a network's domain are to give that network's activations alone; for
this it must be known which calibration image is of which domain.
""".splitlines()


def parents(seeds: Seeds) -> list[str]:
    names = list(seeds[0].baselines)
    return table(
        ["not merged", "accuracy"],
        "---:",
        [[name, spread([one.baselines[name] for one in seeds])] for name in names],
    )


def at_one(seeds: Seeds) -> list[str]:
    matchings = list(seeds[0].at_one)
    return table(
        ["1.0x", *FORMS],
        "---:",
        [[name, *(spread(merged(seeds, name, form)) for form in FORMS)] for name in matchings],
    )


def merged(seeds: Seeds, matching: str, form: str) -> list[float]:
    return [one.at_one[matching][form] for one in seeds]


def claims(seeds: Seeds) -> Iterator[str]:
    found = [paired(merged(seeds, *ours), merged(seeds, *theirs)) for ours, theirs in CLAIMS]
    adjusted = holm([one.p for one in found])
    for (ours, theirs), one, p in zip(CLAIMS, found, adjusted, strict=True):
        verdict = compared(replace(one, p=p))
        yield f"- {', '.join(ours)}, less {', '.join(theirs)}: {verdict}."


def curve_text() -> list[str]:
    return """\
**Between one and both.** Units matched by activations. The *programme* is the published one, by
what groups are worth; *uniform* the same share of each group, *prefix* (ZipIt-like) nothing of the
first groups and all of the last. Budgets are multiples of one network's multiply-adds, structural
zeros not counted.

""".splitlines()


def curve(seeds: Seeds) -> list[str]:
    short = {PUBLISHED: "published", SEQUENTIAL: SEQUENTIAL, OWN: "own targets"}
    head = [f"{short[form]}, {how}" for form in CURVED for how in ALLOCATIONS]
    rows = []
    for at, budget in enumerate(BUDGETS):
        cells = [spread(accuracies(seeds, form, how, at)) for form in CURVED for how in ALLOCATIONS]
        rows.append([f"{budget}x", *cells])
    return table(["budget", *head], "---:", rows)


def accuracies(seeds: Seeds, form: str, how: str, at: int) -> list[float]:
    return [one.curve[form][how][at][1] for one in seeds]


def allocations(seeds: Seeds) -> Iterator[str]:
    yield "Means over the budgets from 1.1x to 1.8x:"
    yield ""
    pairs = [(form, other) for form in CURVED for other in (UNIFORM, PREFIX)]
    found = [paired(between(seeds, f, PROGRAMME), between(seeds, f, other)) for f, other in pairs]
    adjusted = holm([one.p for one in found])
    for (form, other), one, p in zip(pairs, found, adjusted, strict=True):
        yield f"- {form}: programme less {other}: {compared(replace(one, p=p))}."
    costs = [cost for one in seeds for at in BETWEEN for cost in spent(one, at)]
    yield f"- Spent of the budget's part above 1: {100 * min(costs):.0f}% at least."


def between(seeds: Seeds, form: str, how: str) -> list[float]:
    return [statistics.fmean(one.curve[form][how][at][1] for at in BETWEEN) for one in seeds]


def spent(one: Measured, at: int) -> list[float]:
    found = [one.curve[form][how][at][0] for form in CURVED for how in ALLOCATIONS]
    return [(cost - 1) / (BUDGETS[at] - 1) for cost in found]


def data_text() -> list[str]:
    return ["**What it is calibrated on**, at 1.0x, units matched by activations on the same.", ""]


def sizes(seeds: Seeds) -> list[str]:
    return table(
        ["images of each domain", *map(str, SIZES)],
        "---:",
        [
            [form, *(spread([one.sizes[form][at] for one in seeds]) for at in range(len(SIZES)))]
            for form in CURVED
        ],
    )


def other_data(seeds: Seeds) -> list[str]:
    names = list(seeds[0].other_data)
    forms = list(seeds[0].other_data[names[0]])
    return table(
        ["other data (PLeaS-free)", *names],
        "---:",
        [
            [form, *(spread([one.other_data[name][form] for one in seeds]) for name in names)]
            for form in forms
        ],
    )


def search_text(trials: int) -> list[str]:
    return f"""\
**A search over what stays apart**, at {SEARCHED_AT}x: CMA-ES, {trials} candidates, a share for each
group, scaled to the budget (`scaled`), from the same for all or from the programme's; these are the
first candidates. It chooses on the selection part, from which the programme has its worths. All by
{PUBLISHED}. Differences are to the programme.

""".splitlines()


def searches(seeds: Seeds) -> Iterator[str]:
    rows = []
    said = []
    for form in SEARCHED:
        for arm in (*ALLOCATIONS, *STARTED):
            cells = [form, arm]
            for part in ("selection", "report"):
                ours, rule = (
                    searched(seeds, form, arm, part),
                    searched(seeds, form, PROGRAMME, part),
                )
                less = str_of(paired(ours, rule)) if arm != PROGRAMME else ""
                cells += [spread(ours), less]
            rows.append(cells)
        said += verdicts(seeds, form)
    yield from table(
        ["", "", "selection", "less programme", "report", "less programme"], "---:", rows
    )
    yield ""
    yield from said


def verdicts(seeds: Seeds, form: str) -> Iterator[str]:
    """In words; the interval of the difference decides."""
    for search, rule in ((s, r) for s in STARTED for r in (PROGRAMME, UNIFORM)):
        words = []
        for part in ("selection", "report"):
            one = paired(*(searched(seeds, form, arm, part) for arm in (search, rule)))
            beats = "beats" if one.low > 0 else "is beaten by" if one.high < 0 else "does not beat"
            words.append(f"{beats} it on the {part} part ({str_of(one)})")
        yield f"- {form}, {search} against {rule}: {', and '.join(words)}."


def searched(seeds: Seeds, form: str, arm: str, part: str) -> list[float]:
    return [one.search[form][arm][part] for one in seeds]


def compared(one: Paired) -> str:
    return f"{str_of(one)}, p {chance(one.p)}"


def str_of(one: Paired) -> str:
    return f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"


def spread(values: Sequence[float]) -> str:
    """Mean and half of its 95% interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} ± {half:.1f}"
