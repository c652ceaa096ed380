"""The page needs nothing from outside, escapes every name, and draws what the numbers say."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import fake_study as fake
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging.layout import layout
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.values import resolve
from evomerge.sampling import Restart
from evomerge.service import charts
from evomerge.service.charts import Bar
from evomerge.service.coefficients import coefficients, typical_tensors
from evomerge.service.history import MOST_RUNS, Dot, History
from evomerge.service.report import build_report
from evomerge.service.report_page import render
from evomerge.store.base import StudyRecord
from evomerge.trial import Score, TaskScore, Trial

SVG = "{http://www.w3.org/2000/svg}"
LOADING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags and texts, and checks that every tag is closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(study: StudyRecord, trials: list[Trial]) -> str:
    return render(build_report(study, trials), study)


@pytest.fixture(scope="module")
def page() -> str:
    study = fake.record()
    return page_of(study, fake.finished(study, fail_every=17))


def test_the_page_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "link", "iframe", "img")]
    assert not [attrs for _, attrs in parsed.tags if LOADING & attrs.keys()]
    rest = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|url\(|@import", rest)


def test_every_chart_is_well_formed_and_has_words(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 4 + 1 + 3  # mean and three tasks, the history, three sources
    ids: list[str] = []
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("role") == "img"
        title, words = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None
        assert words is not None
        assert title.text
        assert words.text
        ids += [title.get("id", ""), words.get("id", "")]
    assert len(set(ids)) == len(ids)


def test_the_page_says_what_the_report_says(page: str) -> None:
    study = fake.record()
    report = build_report(study, fake.finished(study, fail_every=17))
    text = Page(page).text
    assert report.verdict in text
    for note in report.notes:
        assert note in text
    assert report.winner is not None
    assert report.winner.report is not None
    assert f"{report.winner.report.mean:.3f}" in text
    assert "evomerge best zoo-ties --export DIR" in text
    assert "seed: 7" in text
    assert "2.13.0" in text


def test_cells_of_p_are_plain_and_settings_are_folded(page: str) -> None:
    cells = re.findall(r"<td>([^<]*)</td>", page)
    tested = [cell for cell in cells if re.fullmatch(r"(&lt; 0\.0001|0\.\d+)", cell)]
    assert "&lt; 0.0001" in tested
    assert not [cell for cell in cells if "=" in cell]
    assert "worker processes over the study's life2" in "".join(Page(page).text.split("\n"))
    assert not [attrs for tag, attrs in Page(page).tags if tag == "details" and "open" in attrs]


def test_the_page_says_why_a_comparison_was_not_made() -> None:
    study = fake.record(tasks=("a",))
    bare = Score({"a": TaskScore("f1", 0.9, None, 50)})
    trials = [
        replace(t, scores={**t.scores, "report": bare}) if "report" in t.scores else t
        for t in fake.finished(study)
    ]
    text = Page(page_of(study, trials)).text
    assert "Not tested against the base: task 'a' has 0 and 0 per-item outcomes." in text


def test_names_are_escaped_everywhere() -> None:
    evil = "<script>alert(1)</script>"
    study = fake.record((evil, "a&b"), ("<b>x</b>", "y\x00"), name=f'">{evil}', trials=12)
    parsed = Page(page_of(study, fake.finished(study)))
    assert not {"script", "b"} & {tag for tag, _ in parsed.tags}
    assert evil in parsed.text
    assert "a&b" in parsed.text


@pytest.mark.parametrize("how", ["empty", "unfinished", "failed", "pareto"])
def test_a_page_for_every_kind_of_study(how: str) -> None:
    study = fake.record(trials=20, aggregate="pareto" if how == "pareto" else "mean")
    trials = {
        "empty": lambda: [],
        "unfinished": lambda: fake.searched(study)[:25],
        "failed": lambda: fake.searched(study, fail_every=1),
        "pareto": lambda: fake.finished(study),
    }[how]()
    text = Page(page_of(study, trials)).text
    assert build_report(study, trials).verdict in text
    assert ("The Pareto front" in text) == (how == "pareto")


def test_an_unfinished_search_is_drawn_with_its_baselines() -> None:
    study = fake.record(trials=20)
    trials = fake.searched(study)[:25]
    text = Page(page_of(study, trials)).text
    best = max(t.values or () for t in trials if t.kind == "task_arithmetic")[0]
    assert re.search(rf"task arithmetic [0-9.]+ {best:.3f}", text)


def test_a_model_of_unknown_depth_is_drawn_all_the_same() -> None:
    study = fake.record()
    bare = StudyRecord(study.name, study.spec, {}, study.scorer_digest, study.created_at)
    assert "By layer and tensor type" in page_of(bare, fake.finished(study))


def test_the_template_ships_beside_the_module() -> None:
    import evomerge.service.report_page as module

    assert (Path(module.__file__).parent / "report.html.j2").is_file()


def source(name: str, **parameters: object) -> Source:
    return Source(name, ModelRef(name), parameters)


def test_cells_are_what_the_recipe_resolves_to() -> None:
    rules = [
        {"type": "attention", "value": [0.0, 1.0]},
        {"filter": "mlp", "value": {"blocks": [0.2, 0.8]}},
        {"value": 0.5},
    ]
    recipe = Recipe("ties", ModelRef("base"), (source("a", weight=rules, density=0.3),))
    names = typical_tensors(5)
    (found,) = coefficients(recipe, names)
    assert found.parameter == "weight"
    (grid,) = found.grids
    assert grid.columns == ("in", "0", "1", "2", "3", "4", "out")
    assert [grid.cells["attention", str(i)] for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [grid.cells["mlp", str(i)] for i in range(5)] == [0.2, 0.2, 0.8, 0.8, 0.8]
    assert grid.cells["head", "out"] == grid.cells["embedding", "in"] == 0.5
    for place in layout(names).values():
        column = str(place.layer) if place.layer is not None else ("in", "out")[int(place.depth)]
        assert grid.cells[place.type, column] == resolve(rules, place)


def test_a_cell_is_the_mean_of_its_tensors() -> None:
    rules = [{"filter": "q_proj", "value": 1.0}, {"value": 0.0}]
    recipe = Recipe("linear", None, (source("a", weight=rules),))
    (found,) = coefficients(recipe, ["layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"])
    assert found.grids[0].cells == {("attention", "0"): 0.5}


def test_which_parameter_is_shown() -> None:
    base = ModelRef("base")
    two = (source("a"), source("b"))
    names = typical_tensors(2)
    (slerp,) = coefficients(Recipe("slerp", base, two, {"t": [0.0, 1.0]}), names)
    assert (slerp.parameter, len(slerp.grids)) == ("t", 1)
    (shared,) = coefficients(Recipe("linear", base, two, {"weight": 1.0}), names)
    assert [grid.title for grid in shared.grids] == ["every source"]
    (densities,) = coefficients(Recipe("x", base, (source("a", density=0.3),)), names)
    assert densities.parameter == "density"
    assert coefficients(Recipe("x", base, two, {"normalize": True}), names) == ()


def test_every_searched_parameter_is_shown_the_main_one_first() -> None:
    sources = (source("a", weight=0.5, density=0.3), source("b", weight=0.7, density=0.3))
    recipe = Recipe("ties", ModelRef("base"), sources, {"lambda": [1.0, 2.0], "normalize": False})
    found = coefficients(recipe, typical_tensors(3), ("density", "lambda", "normalize", "weight"))
    assert [heat.parameter for heat in found] == ["weight", "density", "lambda"]
    assert [heat.constants for heat in found] == [{"a": 0.5, "b": 0.7}, {"every source": 0.3}, None]
    assert found[2].grids[0].cells["mlp", "1"] == 1.5


def test_the_page_draws_what_varies_and_writes_what_does_not() -> None:
    study = fake.record(("add", "sort"), ("add", "sort"))
    factors = [{"low": 0.0, "high": 1.0, "init": 0.5}]
    space = {
        "method": "ties",
        "source": {"density": factors, "weight": factors},
        "recipe": {"lambda": factors},
    }
    study = replace(study, spec={**study.spec, "space": space})
    trials = [_with_density(t, {"add": 0.25, "sort": 0.75}) for t in fake.finished(study)]
    page = page_of(study, trials)
    headings = re.findall(r"<h[34]>(\w+)</h[34]>", page[page.index("recipe: trial") :])
    assert headings == ["weight", "add", "sort", "density", "lambda"]
    text = " ".join(Page(page).text.split())
    assert "The same in every layer: add 0.250, sort 0.750." in text
    assert "lambda The same in every layer: 1.000." in text


def _with_density(trial: Trial, densities: dict[str, float]) -> Trial:
    recipe = Recipe.from_json(trial.recipe)
    sources = tuple(
        replace(s, parameters={**s.parameters, "density": densities[s.name]})
        for s in recipe.sources
    )
    return replace(trial, recipe=replace(recipe, sources=sources).to_json())


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0.17, 0.93) == [0.2, 0.4, 0.6, 0.8]
    assert charts.ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]


def test_labels_are_moved_apart_and_stay_inside() -> None:
    placed = charts.spread([50, 51, 52, 300], 16, 0, 310)
    assert sorted(placed) == placed
    assert all(b - a >= 16 for a, b in itertools.pairwise(placed))
    crowded = charts.spread([99, 98, 97], 16, 0, 100)
    assert max(crowded) == 100
    assert crowded[2] < crowded[1] < crowded[0]


def test_the_history_has_a_dot_for_each_trial_and_a_rising_line() -> None:
    dots = [
        Dot(1, 0.2, "trial 1"),
        Dot(2, None, "trial 2"),
        Dot(3, 0.6, "trial 3"),
        Dot(4, 0.4, ""),
    ]
    root = ET.fromstring(charts.history(dots, {"base": 0.3}, scored=3))
    circles = root.findall(f"{SVG}circle")
    heights = [float(circle.get("cy", "")) for circle in circles]
    assert len(circles) == 3
    assert heights[1] < heights[2] < heights[0]  # higher scores lie higher
    assert len([p for p in root.findall(f"{SVG}path") if p.get("class") == "failed"]) == 1
    (best,) = [p for p in root.findall(f"{SVG}path") if p.get("class") == "best"]
    assert best.get("d", "").count("V") == 1
    assert "0.6000" in "".join(root.itertext())


def test_the_history_marks_the_winner_and_restarts() -> None:
    dots = [Dot(x, x / 100, f"trial {15 + x}") for x in range(1, 41)]
    restarts = [Restart(1, 10, 8, 16, ""), Restart(2, 11, 16, 32, ""), Restart(3, 30, 32, 64, "")]
    root = ET.fromstring(
        charts.history(dots, {}, scored=40, winner=Dot(37, 0.37, "trial 52"), restarts=restarts)
    )
    at = {float(c.get("cx", "")): c.get("class") for c in root.findall(f"{SVG}circle")}
    (winner,) = [c for c in root.findall(f"{SVG}circle") if c.get("class") == "winner"]
    (same,) = [c for c in root.findall(f"{SVG}circle") if "trial 52:" in (c[0].text or "")][:1]
    assert (winner.get("cx"), winner.get("cy")) == (same.get("cx"), same.get("cy"))
    lines = [float(v.get("x1", "")) for v in root.iter(f"{SVG}line") if v.get("class") == "restart"]
    order = sorted(at)
    assert order[9] < lines[0] < order[10] < lines[1] < order[11]
    assert order[29] < lines[2] < order[30]


def test_the_winner_is_found_by_both_numbers() -> None:
    study = fake.record(trials=40)
    trials = fake.finished(study)
    report = build_report(study, trials)
    assert report.winner is not None
    place = [t.number for t in trials if t.kind == "search"].index(report.winner.trial.number) + 1
    page = page_of(study, trials)
    both = f"trial {report.winner.trial.number} (search trial {place} of 40)"
    assert both in Page(page[: page.index("<main>")] + "<main></main></body></html>").text
    (circle,) = re.findall(r'<circle [^>]*class="winner"><title>(.*?)</title>', page)
    assert f"trial {report.winner.trial.number}" in circle
    assert report.to_json()["winner"]["search_trial"] == place


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("a", 0.5, (0.4, 0.6), "winner"), Bar("b", 0.25, None, "source")]
    rects = ET.fromstring(charts.bars("k", "t", rows)).findall(f"{SVG}rect")
    long, short = (float(rect.get("width", "")) for rect in rects)
    assert long == pytest.approx(2 * short, abs=0.2)


def test_bars_below_zero_end_at_zero() -> None:
    rows = [Bar("a", -2.0, (-2.5, -1.5), "winner"), Bar("b", -1.0, None, "source")]
    rects = ET.fromstring(charts.bars("k", "t", rows)).findall(f"{SVG}rect")
    ends = [float(r.get("x", "")) + float(r.get("width", "")) for r in rects]
    assert ends[0] == pytest.approx(ends[1], abs=0.2)


@pytest.mark.parametrize("score", [0.0, 0.5, -3.0, 1e6])
def test_a_history_of_one_value_has_a_scale(score: float) -> None:
    ET.fromstring(charts.history([Dot(1, score, "x")], {}, scored=1))


def test_a_short_history_is_shown_whole() -> None:
    history = History()
    dots = [Dot(x, None if x % 7 == 0 else x % 11 / 11, f"trial {x}") for x in range(1, 601)]
    for dot in dots:
        history.put(dot)
    assert history.dots() == dots
    assert history.each == 1


@given(st.integers(601, 2500), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_long_history_keeps_the_extremes_of_every_run(count: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(-2, 6, count).tolist()
    scores = [None if score < 0 else float(score) for score in drawn]
    history = History()
    dots = [Dot(x, score, "") for x, score in enumerate(scores, 1)]
    for dot in dots:
        history.put(dot)
    shown = history.dots()
    assert len(shown) <= 3 * MOST_RUNS
    assert history.scored == sum(score is not None for score in scores)
    each = -(-len(scores) // MOST_RUNS)
    assert history.each == 2 ** (each - 1).bit_length()
    for first in range(0, len(scores), history.each):
        run = dots[first : first + history.each]
        scored = [dot for dot in run if dot.score is not None]
        expected = {dot.x for dot in run if dot.score is None and dot == _first_failed(run)}
        if scored:
            expected.add(min(scored, key=lambda d: (-(d.score or 0.0), d.x)).x)
            expected.add(min(scored, key=lambda d: (d.score or 0.0, d.x)).x)
        assert {dot.x for dot in shown if first < dot.x <= first + history.each} == expected


def _first_failed(run: list[Dot]) -> Dot:
    return next(dot for dot in run if dot.score is None)


def test_a_thinned_history_says_so() -> None:
    study = fake.record(trials=1300)
    rng = np.random.default_rng(0)
    trials = fake.finished(fake.record(trials=12))
    first = trials[-1]
    more = [
        replace(first, number=first.number + n, values=(float(rng.random()),)) for n in range(1300)
    ]
    text = Page(page_of(study, [*trials, *more])).text
    assert "Of every 4 trials in a row the best, the worst and one failed trial are drawn" in text
    assert "1312 scored trials; the best is" in text


def test_restarts_and_refusals_are_told() -> None:
    study = fake.record()
    restarts = [Restart(1, 40, 8, 16, "steps are <small>"), Restart(2, 90, 16, 32, "flat")]
    inspection = {**study.inspection, "restarts": [asdict(r) for r in restarts]}
    study = replace(study, inspection=inspection)
    report = replace(build_report(study, fake.finished(study)), refused={"late": 2, "stray": 1})
    page = Page(render(report, study))
    assert "restart 1 after 40 trials, population 8 to 16: steps are <small>" in page.text
    assert "restart 2 after 90 trials" in page.text
    assert "2 late, 1 stray. They came after their attempt was given up (late)" in page.text
    found = report.to_json()
    assert found["restarts"] == inspection["restarts"]
    assert found["refused"] == {"late": 2, "stray": 1}
    calm = fake.record()
    text = Page(page_of(calm, fake.finished(calm))).text
    assert "began again" not in text
    assert "refused" not in text
