"""docs/results-moe.md as text: merged experts of several seeds, the search, the three forms.

Knows nothing of how anything was measured.
"""

from __future__ import annotations

import itertools
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
from moe_forms import BATCH, DECODED, FULL, IMPLEMENTATIONS, KEEP, PROMPT, Form
from moe_mixtral import Setup
from moe_scores import Scored
from moe_search import COUNTS, GROUPS, RULE, UNIFORM, allocations
from results_page import listed, table
from scipy import stats

import evomerge
from evomerge.scoring.statistics import holm

PUBLISHED, RANDOM = "M-SMoE as published", "grouped by random"
ALPHA = 0.05


@dataclass(frozen=True)
class Measured:
    """One seed: the full model's report loss, the share of each expert by layer, and by `keep`
    what every variant and every search came to."""

    seed: int
    full: float
    usage: Sequence[Sequence[float]]
    variants: Mapping[int, Mapping[str, Scored]]
    searches: Mapping[int, Mapping[str, Scored]]


@dataclass(frozen=True)
class Paired:
    """A mean difference over seeds with its 95% interval and p of Student's t, two-sided."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(values: Sequence[float], reference: Sequence[float]) -> Paired:
    """Values less their reference, seed by seed. Where all differences are the same there is
    nothing to doubt: p is 1 for 0, else 0."""
    differences = np.subtract(values, reference)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return Paired(mean, mean, mean, float(mean == 0))
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Paired(mean, float(low), float(high), float(test.pvalue))


def page(
    setup: Setup,
    found: Sequence[Measured],
    weighed: Mapping[str, Mapping[str, Form]],
    moves: int,
) -> str:
    """The whole page."""
    lines = [*introduction(setup, found), "", *routing(found), ""]
    lines += [*variants_text(), "", *variants(found), ""]
    lines += [*search_text(found, moves), "", *searches(found), ""]
    lines += [*forms_text(), ""]
    for model, known in weighed.items():
        lines += [*forms(model, known), ""]
    return "\n".join(lines)


def introduction(setup: Setup, found: Sequence[Measured]) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    losses = [one.full for one in found]
    return f"""\
# Merging the experts of a mixture: results

Losses of a tiny Mixtral (3 layers, 8 experts, 2 for each token) after its experts were
[merged](guides/experts.md), in nats for each predicted token: less is better. Written by

```sh
python benchmarks/moe.py --folder FOLDER --output docs/results-moe.md
```

with evomerge {evomerge.__version__}, {packages}, Python {platform.python_version()}, in float32
with one thread. Nothing is trained after a merge but the routers called distilled.

**Protocol.** {len(found)} seeds, each with rules, data and a model of its own ({setup.steps} steps
of training). Sequences of {setup.length} tokens in disjoint parts: {setup.calibration} for
calibration, {setup.selection} for the search to choose on, {setup.report} for the losses shown. The
full models' loss is {error(losses)} (mean and standard error over seeds). Differences are paired by
seed, with the 95% interval of Student's t over seeds; p is of the same test, after Holm's
correction over the rows of a column; intervals are not corrected. With {len(found)} seeds a small
difference cannot be told. One toy model on artificial data: take signs as hints, and sizes not at
all.
""".splitlines()


def routing(found: Sequence[Measured]) -> Iterator[str]:
    """How uneven it is."""
    layers = range(len(found[0].usage))
    yield "## How uneven the routing is"
    yield ""
    yield "Share of the busiest and of the least busy expert, and their ratio; even is 0.125."
    yield ""
    yield from table(
        ["seed", *(f"layer {at}" for at in layers)],
        "---:",
        [[str(one.seed), *map(spread, one.usage)] for one in found],
    )


def spread(usage: Sequence[float]) -> str:
    most, least = max(usage), min(usage)
    return f"{most:.3f}, {least:.3f} ({most / least:.1f}x)" if least else f"{most:.3f}, 0"


def variants_text() -> list[str]:
    return """\
## Ways to merge

Loss of M-SMoE as published, and what each way adds to it (below 0 is better) with as many experts
left in the model, 24 before: align to expert 0, group by router logits around the experts that are
busiest over all layers, average by usage, redirect the router. A star marks p < 0.05. Rows with
another name than *collapsed* are exact in the remapped form.
""".splitlines()


def variants(found: Sequence[Measured]) -> Iterator[str]:
    """A row for each, the best on average first, and what the rows say."""
    keeps = list(found[0].variants)
    losses = {keep: report_losses(found, keep) for keep in keeps}
    against = {keep: comparisons(losses[keep]) for keep in keeps}
    ranked = sorted(
        losses[keeps[0]],
        key=lambda name: statistics.fmean(x for keep in keeps for x in losses[keep][name]),
    )
    yield from table(
        ["experts left", *(str(keep * len(found[0].usage)) for keep in keeps)],
        "---:",
        [[name, *(cell(losses[keep], against[keep], name) for keep in keeps)] for name in ranked],
    )
    yield ""
    for keep in keeps:
        yield from said(keep, [name for name in ranked if name != PUBLISHED], against[keep])
    yield from ties(found)


def report_losses(found: Sequence[Measured], keep: int) -> dict[str, list[float]]:
    return {
        name: [one.variants[keep][name].losses["report"] for one in found]
        for name in found[0].variants[keep]
    }


def comparisons(losses: Mapping[str, Sequence[float]]) -> dict[str, Paired]:
    """Every way against the published one, p after Holm's correction."""
    found = {
        name: paired(values, losses[PUBLISHED])
        for name, values in losses.items()
        if name != PUBLISHED
    }
    adjusted = holm([one.p for one in found.values()])
    return {name: replace(one, p=p) for (name, one), p in zip(found.items(), adjusted, strict=True)}


def cell(losses: Mapping[str, Sequence[float]], against: Mapping[str, Paired], name: str) -> str:
    if name not in against:
        return f"loss {error(losses[name])}"
    return f"{against[name]}{' *' * (against[name].p < ALPHA)}"


def said(keep: int, names: Sequence[str], against: Mapping[str, Paired]) -> Iterator[str]:
    told = [name for name in names if against[name].p < ALPHA]
    better = [name for name in told if against[name].mean < 0]
    worse = [name for name in told if name not in better]
    yield (
        f"- {keep} of 8: better than M-SMoE as published, beyond chance: {listed(better)}. Worse:"
        f" {listed(worse)}. For the other {len(names) - len(told)} no difference is shown"
        f"{', grouping at random among them' * (RANDOM in names and RANDOM not in told)}."
    )


def ties(found: Sequence[Measured]) -> Iterator[str]:
    """Where the published rule keeps fewer experts than it was asked for."""
    for one, keep in itertools.product(found, found[0].variants):
        size, left = keep * len(one.usage), sum(one.variants[keep][PUBLISHED].experts)
        if left < size:
            yield (
                f"- On seed {one.seed} the published rule, and the rows that follow it, keep {left}"
                f" experts instead of {size}: experts at its threshold are used equally often."
            )


def error(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.3f} ± {spread:.3f}"


def search_text(found: Sequence[Measured], moves: int) -> list[str]:
    layers, experts = len(found[0].usage), len(found[0].usage[0])
    sizes = [keep * layers for keep in found[0].searches]
    tried = ", ".join(f"{sum(1 for _ in allocations(layers, experts, n))} for {n}" for n in sizes)
    return f"""\
## Searching how many experts each layer keeps

The size is fixed, all else as published. *{RULE.capitalize()}* gives busy layers more experts.
*{COUNTS.capitalize()}* tries every allocation of at least one expert to a layer
({tried}, so that no sampler is needed) and takes the best on the selection part.
*{GROUPS.capitalize()}*: of {moves} random changes of who is merged with whom, those that lower the
selection loss are kept, one after another. On the selection part a search cannot lose to a rule
whose allocation it has tried: what it has found out shows on the report part. *Seeds* are those
where the loss is lower than by the rule.
""".splitlines()


def searches(found: Sequence[Measured]) -> Iterator[str]:
    """A row for each size and arm, and whether the search beats the rule on either part."""
    rows, said = [], []
    for keep in found[0].searches:
        for arm in (RULE, UNIFORM, COUNTS, GROUPS):
            rows.append(search_row(found, keep, arm))
            if arm in (COUNTS, GROUPS):
                said.append(verdict(found, keep, arm))
    head = ["experts left", "", "selection", "less the rule", "seeds"]
    head += ["report", "less the rule", "seeds", "experts by layer, seed by seed"]
    yield from table(head, "---:", rows)
    yield ""
    yield from said


def search_row(found: Sequence[Measured], keep: int, arm: str) -> list[str]:
    cells = [str(keep * len(found[0].usage)), arm]
    for part in ("selection", "report"):
        ours, rule = arm_losses(found, keep, arm, part), arm_losses(found, keep, RULE, part)
        won = sum(a < b for a, b in zip(ours, rule, strict=True))
        compared = [str(paired(ours, rule)), f"{won} of {len(found)}"]
        cells += [f"{statistics.fmean(ours):.3f}", *(compared if arm != RULE else ["", ""])]
    kept = [one.searches[keep][arm].experts for one in found]
    return [*cells, ", ".join(" ".join(map(str, counts)) for counts in kept)]


def arm_losses(found: Sequence[Measured], keep: int, arm: str, part: str) -> list[float]:
    return [one.searches[keep][arm].losses[part] for one in found]


def verdict(found: Sequence[Measured], keep: int, arm: str) -> str:
    """In words; the interval of the difference decides."""
    words = []
    for part in ("selection", "report"):
        one = paired(*(arm_losses(found, keep, name, part) for name in (arm, RULE)))
        beats = "beats" if one.high < 0 else "is beaten by" if one.low > 0 else "does not beat"
        words.append(f"{beats} the rule on the {part} part")
    return f"- {keep} of 8, {arm}: {', '.join(words)}."


def forms_text() -> list[str]:
    return f"""\
## Three forms

{KEEP} of 8 experts, as many in every layer. Times are of a forward pass as a share of the full
model's with the same implementation of experts in transformers (it takes {IMPLEMENTATIONS[0]} by
itself): CPU time of one thread, the forms by turns, medians. Prefill is a batch of {BATCH} prompts
of {PROMPT} tokens, decoding the {DECODED} tokens after it. The replicated form computes exactly
what a full model does, so that its distance from 1 is the error of the rest.
""".splitlines()


def forms(model: str, known: Mapping[str, Form]) -> list[str]:
    head = [model, "parameters", "bytes of weights", "to full"]
    head += [f"{each} {what}" for each in IMPLEMENTATIONS for what in ("prefill", "decoding")]
    whole = known[FULL].weights_bytes
    return table(
        head,
        "---:",
        [
            [
                name,
                f"{form.parameters:,}",
                f"{form.weights_bytes:,}",
                f"{form.weights_bytes / whole:.2f}",
                *(f"{share:.2f}" for each in IMPLEMENTATIONS for share in form.times[each]),
            ]
            for name, form in known.items()
        ],
    )
