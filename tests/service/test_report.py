"""The report's numbers against hand counts, and its words against outcomes built to be so."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import timedelta
from statistics import geometric_mean
from typing import Any

import fake_study as fake
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evomerge.service.cost import cost, covered_us
from evomerge.service.measurement import interval, measure
from evomerge.service.report import Report, build_report
from evomerge.service.report_table import final_text, print_report
from evomerge.trial import Score, State, TaskScore, Trial


def with_report(trials: list[Trial], kind: str, outcomes: dict[str, tuple[float, ...]]) -> None:
    """Give every trial of a kind these outcomes on the report items."""
    score = Score({task: fake.outcomes_score(o) for task, o in outcomes.items()})
    for place, trial in enumerate(trials):
        if trial.kind == kind and "report" in trial.scores:
            trials[place] = replace(trial, scores={**trial.scores, "report": score})


def constructed(winner: dict[str, tuple[float, ...]], base: dict[str, tuple[float, ...]]) -> Report:
    """A finished study where winner and base have exactly these outcomes."""
    study = fake.record(tasks=tuple(winner))
    trials = fake.finished(study)
    with_report(trials, "search", winner)
    with_report(trials, "base", base)
    return build_report(study, trials)


def against(report: Report, name: str) -> Any:
    return next(outcome for outcome in report.comparisons if outcome.against == name)


def right(count: int, n: int = 80) -> tuple[float, ...]:
    return (1.0,) * count + (0.0,) * (n - count)


def test_the_json_has_the_promised_keys_and_is_json() -> None:
    study = fake.record()
    report = build_report(study, fake.finished(study, fail_every=17))
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["study"] == "zoo-ties"
    assert document["trials"]["complete"] == 15 + 57  # 15 baselines; every 17th of 60 trials failed
    assert document["trials"]["failed"] == 3
    assert document["trials"]["search"]["planned"] == 60
    assert set(document["winner"]["report"]) == {"add", "reverse", "sort", "mean"}
    assert len(document["winner"]["recipe_digest"]) == 64
    assert document["winner"]["recipe"]["method"] == "task_arithmetic"
    assert len(document["winner"]["genome"]) == 12
    assert set(document["winner"]["search"]) == set(document["winner"]["selection"])
    for name in ("base", "best_source", "uniform", "task_arithmetic"):
        assert set(document["baselines"][name]["report"]) == {"add", "reverse", "sort", "mean"}
    assert set(document["baselines"]["sources"]) == {"add", "reverse", "sort"}
    assert [c["against"] for c in document["comparisons"]] == [
        "base",
        "best_source",
        "uniform",
        "task_arithmetic",
    ]
    assert {"difference", "interval", "p_value", "p_holm", "verdict"} <= set(
        document["comparisons"][0]
    )
    assert document["pareto"] == []
    assert document["finished"] is True


def test_values_and_means_are_those_of_the_report_items() -> None:
    report = constructed({"a": right(64), "b": right(32)}, {"a": right(16), "b": right(8)})
    assert report.winner is not None
    assert report.winner.to_json()["report"] == {"a": 0.8, "b": 0.4, "mean": pytest.approx(0.6)}
    assert against(report, "base").difference == pytest.approx(0.45)


def test_weights_enter_the_mean_and_lower_is_better_turns_the_sign() -> None:
    score = Score(
        {
            "acc": TaskScore("acc", 0.5, None, 4, True, ()),
            "loss": TaskScore("loss", 2.0, 0.1, 4, False, ()),
        }
    )
    measured = measure(score, {"acc": 3.0, "loss": 1.0})
    assert measured.mean == pytest.approx((3 * 0.5 - 2.0) / 4)
    assert measured.values == {"acc": 0.5, "loss": 2.0}
    assert measured.intervals["acc"] is None
    assert measured.mean_interval is None


def test_intervals_of_a_share_are_wilsons_and_else_normal() -> None:
    # 10 of 20 right: (0.5 + z²/40 ± z sqrt(0.25/20 + z²/1600)) / (1 + z²/20) by hand
    assert interval(fake.outcomes_score(right(10, 20))) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    low, high = interval(fake.outcomes_score(right(0, 20))) or (0, 0)
    assert low == 0.0
    assert high == pytest.approx(0.1611, abs=1e-4)
    assert interval(TaskScore("f1", 0.6, 0.1, 9)) == pytest.approx((0.404, 0.796), abs=1e-4)


def test_the_mean_of_one_task_has_that_tasks_interval() -> None:
    measured = measure(Score({"a": fake.outcomes_score(right(3, 20))}), {"a": 2.0})
    assert measured.mean_interval == pytest.approx(measured.intervals["a"])


def test_a_clear_win_is_called_better() -> None:
    report = constructed({"a": right(72)}, {"a": right(16)})
    outcome = against(report, "base")
    assert outcome.verdict == "better"
    assert outcome.sentence.startswith("Better than the base on 80 items: +0.700")
    assert "is better than the base" in report.verdict


def test_a_clear_loss_is_called_worse() -> None:
    report = constructed({"a": right(16)}, {"a": right(72)})
    assert against(report, "base").verdict == "worse"
    assert "is worse than the base" in report.verdict
    assert "better than the base" not in final_text(report)


def test_a_small_gain_is_not_called_better() -> None:
    report = constructed({"a": right(27)}, {"a": right(25)})
    outcome = against(report, "base")
    assert outcome.difference == pytest.approx(2 / 80)
    assert outcome.p_value == pytest.approx(0.5)  # two discordant items of one kind: 2 * 0.5**2
    assert outcome.verdict == "no difference shown"
    assert "No difference shown from the base on 80 items" in outcome.sentence
    assert "shows no difference from the base" in report.verdict


def test_the_same_outcomes_show_no_difference() -> None:
    report = constructed({"a": right(25)}, {"a": right(25)})
    assert against(report, "base").p_value == 1.0
    assert against(report, "base").verdict == "no difference shown"


def test_holm_can_take_better_away() -> None:
    """Six discordant items of one kind: p = 2 / 2**6 = 0.031 alone, not among four comparisons."""
    study = fake.record(tasks=("a",))
    trials = fake.finished(study)
    with_report(trials, "search", {"a": right(31)})
    for kind in ("base", "source", "uniform", "task_arithmetic"):
        with_report(trials, kind, {"a": right(25)})
    report = build_report(study, trials)
    outcome = against(report, "base")
    assert outcome.p_value == pytest.approx(2 / 64)
    assert outcome.p_holm == pytest.approx(4 * 2 / 64)
    assert outcome.verdict == "no difference shown"
    assert "better" not in report.verdict


def test_without_outcomes_nothing_is_claimed() -> None:
    study = fake.record(tasks=("a",))
    trials = fake.finished(study)
    bare = Score({"a": TaskScore("f1", 0.9, None, 50)})
    trials = [
        replace(t, scores={**t.scores, "report": bare}) if "report" in t.scores else t
        for t in trials
    ]
    report = build_report(study, trials)
    assert {outcome.verdict for outcome in report.comparisons} == {"not tested"}
    assert against(report, "base").p_value is None
    assert "was not tested against" in report.verdict


def test_a_baseline_on_other_items_is_not_tested_and_the_rest_is() -> None:
    report = constructed({"a": right(72)}, {"a": right(10, n=50)})
    assert against(report, "base").verdict == "not tested"
    assert "80 and 50 per-item outcomes" in against(report, "base").sentence
    assert against(report, "uniform").verdict == "better"


def test_a_value_that_is_no_mean_of_its_items_is_not_compared_item_by_item() -> None:
    # mean over items better by 2.5, perplexity (their geometric mean) worse: a test would mislead
    perplexity = {"winner": (9.0, 9.0, 9.0, 9.0), "base": (40.0, 2.0, 2.0, 2.0)}
    scores = {
        name: Score({"a": TaskScore("perplexity", geometric_mean(o), None, 4, False, o)})
        for name, o in perplexity.items()
    }
    study = fake.record(tasks=("a",))
    trials = [
        replace(t, scores={**t.scores, "report": scores["base" if t.kind == "base" else "winner"]})
        if "report" in t.scores
        else t
        for t in fake.finished(study)
    ]
    outcome = against(build_report(study, trials), "base")
    assert outcome.verdict == "not tested"
    assert "perplexity of task 'a' is no mean over its items" in outcome.sentence


def test_an_unfinished_search_has_a_leader_and_no_winner() -> None:
    study = fake.record(trials=60)
    report = build_report(study, fake.searched(study)[:40])
    assert report.winner is None
    assert report.leader is not None
    assert report.comparisons == ()
    assert report.verdict == "There is no winner yet."
    assert report.notes == ("The search has finished 25 of 60 trials.",)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["winner"] is None
    assert document["baselines"]["base"] is None
    assert document["baselines"]["sources"]["add"]["report"] is None
    assert document["finished"] is False


def test_a_searched_study_says_what_is_still_to_be_scored() -> None:
    study = fake.record()
    report = build_report(study, fake.searched(study))
    assert report.notes == ("Not scored on the selection items: 23 candidates.",)


def test_a_winner_not_yet_on_report_items_is_only_so_far() -> None:
    study = fake.record()
    trials = [
        replace(t, scores={part: s for part, s in t.scores.items() if part != "report"})
        for t in fake.finished(study)
    ]
    report = build_report(study, trials)
    assert report.winner is not None
    assert report.verdict.startswith("The winner so far is trial ")
    assert report.winner.to_json()["report"] is None
    assert report.notes[0].startswith("Not scored on the report items: 7 candidates")


def test_a_larger_budget_makes_the_winner_one_so_far() -> None:
    study = fake.record(trials=60)
    trials = fake.finished(study)
    report = build_report(fake.record(trials=90), trials)
    assert "the winner so far (trial" in report.verdict
    assert "The search has finished 60 of 90 trials." in report.notes


def test_a_study_whose_every_trial_failed() -> None:
    study = fake.record(trials=5)
    report = build_report(study, fake.searched(study, fail_every=1))
    assert report.winner is None
    assert report.leader is None
    assert report.verdict == "There is no winner: every trial of the search failed."
    assert "5 trials of the search failed; most often (5): NonFiniteModel" in report.notes[0]
    json.dumps(report.to_json(), allow_nan=False)


def test_an_empty_study() -> None:
    report = build_report(fake.record(), [])
    assert report.verdict == "There is no winner yet."
    assert report.cost.wall_s is None
    assert final_text(report).splitlines()[0] == "There is no winner yet."


def test_a_pareto_study_lists_its_front() -> None:
    study = fake.record(aggregate="pareto")
    trials = fake.finished(study)
    front = build_report(study, trials).front
    points = [candidate.trial.values or () for candidate in front]
    everyone = [t.values for t in trials if t.kind == "search" and t.values]
    assert points
    for point in points:
        assert not any(
            other != point and all(a >= b for a, b in zip(other, point, strict=True))
            for other in everyone
        )
    assert all("report" in candidate.parts for candidate in front)


def test_cost_adds_up_attempts_and_finds_idle_time() -> None:
    study = fake.record(trials=3)
    trials = fake.searched(study)
    one, two = trials[0], trials[1]
    attempt = one.attempts[0]
    apart = replace(
        two.attempts[0],
        started_at=attempt.started_at + timedelta(seconds=10),
        finished_at=attempt.started_at + timedelta(seconds=13),
        seconds={"materialise": 1.0, "score": 1.5, "load": 0.25},
        state=State.FAIL,
    )
    spent = cost([one, replace(two, attempts=(apart,))])
    assert spent.phases == pytest.approx({"materialise": 1.2, "score": 3.0, "load": 0.25})
    assert (spent.attempts, spent.failed_attempts) == (2, 1)
    assert spent.wall_s == pytest.approx(13.0)
    assert spent.idle_s == pytest.approx(13.0 - 1.9 - 3.0)
    assert spent.overhead_s == pytest.approx((1.9 - 1.7) + (3.0 - 2.75))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=12))
def test_overlapping_spans_count_once(spans: list[tuple[int, int]]) -> None:
    covered = {t for start, length in spans for t in range(start, start + length)}
    starts, ends = [s for s, _ in spans], [s + length for s, length in spans]
    assert covered_us(starts, ends) == len(covered)


def test_the_text_table_is_aligned_markdown_and_honest() -> None:
    study = fake.record()
    report = build_report(study, fake.finished(study))
    table, words = final_text(report).split("\n\n")
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "base",
        "source add",
        "source reverse (best)",
        "source sort",
        "uniform average",
        "task arithmetic 0.4 (best)",
        f"winner ({report.winner.title})" if report.winner else "",
    ]
    assert "add (n=80)" in lines[0]
    assert "mean (n=240)" in lines[0]
    assert words.splitlines()[0] == report.verdict
    assert len(words.splitlines()) == 1 + 4


def shown(report: Report, *, width: int, terminal: bool) -> str:
    console = Console(record=True, width=width, force_terminal=terminal, file=io.StringIO())
    print_report(report, console)
    return console.export_text()


def test_the_terminal_table_fits_and_shows_names_as_they_are() -> None:
    study = fake.record(tasks=("[b]x[/b]", "b", "c"))
    report = build_report(study, fake.finished(study))
    text = shown(report, width=80, terminal=True)
    assert "[b]x[/b]" in text
    assert "…" not in text
    table = text[: text.index(report.verdict)]
    assert "|" not in table
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
    (winner,) = [line.split() for line in table.splitlines() if line.startswith(" winner")]
    assert report.winner is not None
    assert report.winner.report is not None
    assert [f"{value:.3f}" for value in report.winner.report.values.values()] == winner[-3:]


@pytest.mark.parametrize(("width", "terminal"), [(40, True), (200, False)])
def test_without_room_or_terminal_it_is_plain_text(width: int, terminal: bool) -> None:
    study = fake.record()
    report = build_report(study, fake.finished(study))
    assert shown(report, width=width, terminal=terminal).strip() == final_text(report)
