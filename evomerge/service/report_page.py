"""The report as one HTML page that needs nothing else: no network, no script, no other file.

Words come from `report`, drawings from `charts`; this only arranges them. Every name of the user's
is escaped: by the template, and by the element tree that the charts are built as.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evomerge.merging.recipe import Recipe
from evomerge.service import charts
from evomerge.service.charts import Bar
from evomerge.service.coefficients import WHOLE, Coefficients, coefficients, typical_tensors
from evomerge.service.cost import Cost
from evomerge.service.history import Dot, History
from evomerge.service.measurement import Interval
from evomerge.service.notices import RESTARTS, refusals_text, restart_texts
from evomerge.service.report import Candidate, Outcome, Report, p_text
from evomerge.service.report_table import Row, rows_of
from evomerge.store.base import StudyRecord

_UNKNOWN_DEPTH = 8  # layers drawn for a model whose number of layers was not recorded
# parts of an inspection that no one reads on a page, or that it has elsewhere
_BULKY = ("tensors", "items", "digests", RESTARTS)
_MOST_RESTARTS = 20
_PHASES = {
    "load": "loading models",
    "materialise": "building candidates",
    "score": "scoring candidates",
}
_REFUSED = (
    "They came after their attempt was given up (late), a second time (repeated) or for no attempt "
    "of this study (stray). No trial was scored by them, so they do no harm."
)

Fact = tuple[str, str]


def render(report: Report, record: StudyRecord, store_option: str = "") -> str:
    """The page as text. `store_option` is what a command needs to reach the study's store."""
    environment = Environment(
        loader=PackageLoader("evomerge.service", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = rows_of(report)
    shown = report.winner or report.leader
    return environment.get_template("report.html.j2").render(
        report=report,
        facts=_facts(report, record),
        rows=rows,
        comparisons=[_comparison_cells(outcome) for outcome in report.comparisons],
        front=[(c.title, c.parts.get("report") or c.parts.get("search")) for c in report.front],
        bars=_bars(rows),
        history=_history(report),
        thinned=_thinned(report.history),
        marked=_marked(report) is not None,
        restarts=restart_texts(report.restarts, _MOST_RESTARTS),
        shown=shown,
        whole=WHOLE,
        parameters=[] if shown is None else _parameters(shown, record),
        recipe="" if shown is None else _yaml(shown.trial.recipe),
        costs=cost_facts(report.cost),
        spec=_yaml(record.spec),
        found=_found(record),
        export=f"evomerge best {shlex.quote(report.study)}{store_option} --export DIR",
        number=_number,
        interval=_interval,
    )


def cost_facts(cost: Cost) -> list[Fact]:
    """What the study cost, as labels and durations."""
    phases = [(_PHASES.get(name, name), _duration(s)) for name, s in cost.phases.items()]
    failed = f", {cost.failed_attempts} of them failed" if cost.failed_attempts else ""
    reused = [("answered from the store", str(cost.reused))] if cost.reused else []
    facts = [*phases, ("evaluations", f"{cost.attempts}{failed}"), *reused]
    if cost.wall_s is None or cost.overhead_s is None or cost.idle_s is None:
        return facts
    return [
        *facts,
        ("sending out, waiting, recording", _duration(cost.overhead_s)),
        ("wall clock, first start to last finish", _duration(cost.wall_s)),
        ("of it with nothing running (controller, pauses)", _duration(cost.idle_s)),
        ("worker processes over the study's life", str(cost.workers)),
    ]


def _facts(report: Report, record: StudyRecord) -> list[Fact]:
    counts, sampler = report.search_counts, record.spec.get("sampler", {})
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    refused = refusals_text(report.refused)
    weighted = ", ".join(f"{task} × {weight:g}" for task, weight in report.weights.items())
    shown = report.winner or report.leader
    name = "winner" if report.winner else "best so far"
    return [
        *([(name, _numbered(shown, counts["planned"]))] if shown else []),
        ("created", _moment(record.created_at)),
        ("search", f"{counts['complete']} of {counts['planned']} trials scored{failed}"),
        ("sampler", f"{sampler.get('name', 'cmaes')}, seed {sampler.get('seed', 0)}"),
        ("sources", ", ".join(record.spec["sources"])),
        ("mean of", weighted),
        *([("results refused", f"{refused}. {_REFUSED}")] if refused else []),
    ]


def _comparison_cells(outcome: Outcome) -> Mapping[str, str]:
    tested = outcome.p_value is not None and outcome.p_holm is not None
    return {
        "against": outcome.title.removeprefix("the "),
        "difference": _number(outcome.difference, signed=True),
        "interval": _interval(outcome.interval, signed=True),
        "p_value": _p_value(outcome.p_value or 0.0) if tested else "–",
        "p_holm": _p_value(outcome.p_holm or 0.0) if tested else "–",
        "verdict": outcome.verdict,
        "kind": outcome.verdict.split()[0],
        "untested": "" if tested else outcome.sentence,
    }


def _numbered(candidate: Candidate, planned: int) -> str:
    """A trial by both its numbers: baselines are numbered first, charts count the search alone."""
    if candidate.place is None:
        return f"{candidate.title} ({candidate.trial.label})"
    return f"{candidate.title} (search trial {candidate.place} of {planned})"


def _p_value(p: float) -> str:
    """A cell of a column that is headed p."""
    return p_text(p).removeprefix("p ").removeprefix("= ")


def _bars(rows: Sequence[Row]) -> list[tuple[str, Markup]]:
    """A chart of the mean, then one for each task. Markup is safe: the charts escape names."""
    if not rows:
        return []
    first = rows[0][1]
    drawn = [("mean", [_bar(label, m.mean, m.mean_interval) for label, m in rows])]
    for task, items in first.items.items():
        bars = [_bar(label, m.values[task], m.intervals[task]) for label, m in rows]
        drawn.append((f"{task} ({items} items)", bars))
    return [
        (title, Markup(charts.bars(f"bars-{i}", title, bars)))
        for i, (title, bars) in enumerate(drawn)
    ]


def _bar(label: str, value: float, interval: Interval | None) -> Bar:
    """The colour says what is a source, so its name has the room for itself."""
    if label.startswith("source "):
        return Bar(label.removeprefix("source "), value, interval, "source")
    return Bar(label, value, interval, "winner" if label.startswith("winner ") else "baseline")


def _history(report: Report) -> Markup | None:
    dots = report.history.dots()
    if not dots:
        return None
    return Markup(
        charts.history(
            dots,
            report.references,
            scored=report.history.scored,
            winner=_marked(report),
            restarts=report.restarts,
        )
    )


def _marked(report: Report) -> Dot | None:
    """The winner in the history; None where it is no trial of the search."""
    winner = report.winner
    score = None if winner is None else winner.parts.get("search")
    if winner is None or winner.place is None or score is None:
        return None
    return Dot(winner.place, score.mean, winner.title)


def _thinned(history: History) -> str:
    """What of the trials is drawn, where that is not all."""
    if history.each == 1:
        return ""
    return (
        f"Of every {history.each} trials in a row the best, the worst and one failed trial are "
        "drawn; the blue line is that of all."
    )


def _parameters(
    candidate: Candidate, record: StudyRecord
) -> list[tuple[Coefficients, list[tuple[str, Markup]]]]:
    """Each parameter that was searched, with a heat map for each of its grids if it varies."""
    layers = int(record.inspection.get("layers") or _UNKNOWN_DEPTH)
    tensors = record.inspection.get("tensors") or typical_tensors(layers)
    recipe = Recipe.from_json(candidate.trial.recipe)
    found = coefficients(recipe, tensors, _searched(record))
    return [
        (heat, [] if heat.constants else _heat_maps(f"heat-{i}", heat))
        for i, heat in enumerate(found)
    ]


def _searched(record: StudyRecord) -> list[str]:
    """The names of the parameters that the study's space has factors for."""
    space = record.spec["space"]
    every = [*space.get("source", {}).items(), *space.get("recipe", {}).items()]
    return [name for name, entry in every if isinstance(entry, list)]


def _heat_maps(key: str, heat: Coefficients) -> list[tuple[str, Markup]]:
    return [
        (grid.title, Markup(charts.heat_map(f"{key}-{i}", grid, heat.largest)))
        for i, grid in enumerate(heat.grids)
    ]


def _found(record: StudyRecord) -> list[Fact]:
    """What was recorded of the models, tasks and versions when the study was created."""
    kept = {k: v for k, v in record.inspection.items() if k not in _BULKY}
    digests = record.inspection.get("digests", {})
    facts = [(f"digest of {path}", str(digest)) for path, digest in digests.items()]
    shown = [(k, v if isinstance(v, str) else json.dumps(v, default=str)) for k, v in kept.items()]
    return [*shown, ("scorer", record.scorer_digest), *facts]


def _yaml(document: Any) -> str:
    plain = json.loads(json.dumps(document, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=88)


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _interval(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (_number(end, signed=signed) for end in interval)
    return f"[{low}, {high}]"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _moment(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
