"""Studies that name an artifact: what passes, what is refused, and how it is said.

Models and tasks are real files of a tiny zoo, inspected as a worker does.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from run_synthetic import run_synthetic

from evomerge.checkpoints.adapted import open_model
from evomerge.errors import SpecError, StudyChanged
from evomerge.merging.fitted.artifact import DOCUMENT, Provenance, draft, open_artifact
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.scoring.splits import part_of
from evomerge.scoring.tasks import load_tasks
from evomerge.service.report import stored_report
from evomerge.service.study import Models, open_study
from evomerge.service.worker import Worker
from evomerge.space import load_space
from evomerge.spec import StudySpec
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor

SPACE = {
    "method": "sens_merging",
    "recipe": {"temperature": [{"low": 0.1, "high": 10.0, "init": 1.0, "scale": "log"}]},
}
ARITHMETIC = {
    "method": "task_arithmetic",
    "source": {"weight": [{"low": 0.0, "high": 1.0, "init": 0.5, "per": "source"}]},
}


class Inspecting(SyntheticExecutor):
    """Inspects in this process."""

    def inspect(self, spec: Any) -> Any:
        return Worker().inspect(spec)


def spec(zoo: Path, artifact: Path | None, **changes: Any) -> StudySpec:
    document = {
        "name": "s",
        "base": str(zoo / "base"),
        "sources": {name: str(zoo / name) for name in ("compare", "sort")},
        "space": SPACE,
        "artifact": artifact and str(artifact),
        "objective": {"include_path": str(zoo / "tasks"), "tasks": ["compare", "sort"]},
        "budget": {"trials": 4},
    }
    return StudySpec.model_validate({**document, **changes})


@pytest.fixture(scope="module")
def digests(tiny_zoo: Path) -> dict[str, str]:
    names = ("base", "compare", "sort", "reverse")
    return {name: open_model(str(tiny_zoo / name)).scan().digest for name in names}


def fitted(
    folder: Path,
    digests: dict[str, str],
    *,
    items: Sequence[str] = (),
    number: float = 1.0,
    **changes,
) -> Path:
    """An artifact that was never fitted, of the study's models."""
    known = Provenance(
        kind=changes.get("kind", "sensitivity"),
        base=digests["base"],
        sources=changes.get("sources", {n: digests[n] for n in ("compare", "sort")}),
        calibration="c0",
        counts={},
        described={},
        settings={},
        seed=0,
        items=list(items),
    )
    with draft(folder, known) as work:
        work.finish({"x": torch.tensor([number])}, {}, flops=0.0)
    return folder


def problems(wanted: StudySpec) -> list[str]:
    with pytest.raises(SpecError) as caught:
        open_study(wanted, MemoryStore(), Inspecting())
    return caught.value.problems


def test_candidates_name_the_artifact_by_its_contents(tiny_zoo, digests, tmp_path):
    folder = fitted(tmp_path / "sens", digests)
    record = open_study(spec(tiny_zoo, folder), MemoryStore(), Inspecting())
    digest = open_artifact(folder).digest
    assert record.inspection["digests"][str(folder)] == digest
    models = Models.of(record)
    assert models.artifact == ModelRef(str(folder), digest)
    recipe = load_space(SPACE).decode(
        (0.5,),
        base=models.base,
        sources=models.sources,
        dtype=None,
        seed=0,
        artifact=models.artifact,
    )
    assert Recipe.from_json(recipe.to_json()).artifact == models.artifact
    assert recipe.located({digest: "/elsewhere"}).artifact.path == "/elsewhere"


def test_a_method_that_learns_needs_one_and_others_take_none(tiny_zoo, digests, tmp_path):
    (line,) = problems(spec(tiny_zoo, None))
    assert "sens_merging" in line
    assert "`evomerge fit RECIPE.yaml DIR`" in line
    folder = fitted(tmp_path / "sens", digests)
    (line,) = problems(spec(tiny_zoo, folder, space=ARITHMETIC))
    assert line == "artifact: the space's task_arithmetic looks at no data; leave it out"


def test_it_must_be_there_whole_and_of_the_kind_and_models(tiny_zoo, digests, tmp_path):
    (line,) = problems(spec(tiny_zoo, tmp_path / "none"))
    assert "no artifact of a fit" in line
    (line,) = problems(spec(tiny_zoo, fitted(tmp_path / "g", digests, kind="gram")))
    assert "was fitted as 'gram', the space's sens_merging applies 'sensitivity'" in line
    others = {"compare": digests["compare"], "sort": digests["reverse"]}
    (line,) = problems(spec(tiny_zoo, fitted(tmp_path / "o", digests, sources=others)))
    assert "source 'sort' was another model when it was fitted" in line
    damaged = fitted(tmp_path / "d", digests)
    text = (damaged / DOCUMENT).read_text()
    (damaged / DOCUMENT).write_text(text.replace('"calibration": "c0"', '"calibration": "c1"'))
    (line,) = problems(spec(tiny_zoo, damaged))
    assert "damaged; fit it again" in line


def test_it_may_not_have_seen_what_decides(tiny_zoo, digests, tmp_path):
    wanted = spec(tiny_zoo, tmp_path / "seen")
    tasks = load_tasks(wanted.objective)
    compare, sort = (task.hashes for task in tasks.tasks)
    apart = [h for h in compare if part_of(h, tasks.split) != "search"]
    free = [h for h in sort if part_of(h, tasks.split) == "search"]
    fitted(tmp_path / "seen", digests, items=sorted({*apart[:3], *free}))
    (line,) = problems(wanted)
    assert "was fitted on 3 of the items that task 'compare' selects or reports on" in line
    folder = fitted(tmp_path / "searched", digests, items=sorted(set(free)))
    open_study(spec(tiny_zoo, folder), MemoryStore(), Inspecting())
    # the split decides: what this study searches on, another may report on
    split = {"search": 0.2, "selection": 0.2, "report": 0.6}
    objective = {**wanted.objective.model_dump(mode="json"), "split": split}
    (line,) = problems(spec(tiny_zoo, folder, objective=objective))
    assert "task 'sort'" in line


def test_moved_it_is_the_same_and_fitted_again_it_is_not(tiny_zoo, digests, tmp_path):
    store, folder = MemoryStore(), fitted(tmp_path / "sens", digests)
    open_study(spec(tiny_zoo, folder), store, Inspecting())
    shutil.move(folder, tmp_path / "moved")
    record = open_study(spec(tiny_zoo, tmp_path / "moved"), store, Inspecting())
    assert Models.of(record).artifact.path == str(tmp_path / "moved")
    other = fitted(tmp_path / "other", digests, number=2.0)
    with pytest.raises(StudyChanged, match=r"artifact: .*sens \(contents .*other \(contents "):
        open_study(spec(tiny_zoo, other), store, Inspecting())


def averaging(folder: Path, digests: dict[str, str], weights: dict[str, float]) -> Path:
    """AdaMerging's artifact, with the same weight of a source in every tensor."""
    names = sorted(weights)
    tensors = open_model(str(folder.parent / "zoo" / "base")).names
    known = Provenance(
        kind="adamerging",
        base=digests["base"],
        sources={n: digests[n] for n in names},
        calibration="c0",
        counts={},
        described={},
        settings={},
        seed=0,
    )
    row = torch.tensor([weights[n] for n in names], dtype=torch.float64)
    facts = {"sources": names, "start": 0.3, "selection": None}
    with draft(folder, known) as work:
        work.finish({name: row.clone() for name in tensors}, facts, flops=0.0)
    return folder


def starting(zoo: Path, start: Path, trials: int, **sampler: Any) -> StudySpec:
    drawn = {"population": 4, "seed": 3, "start": str(start), **sampler}
    return spec(zoo, None, space=ARITHMETIC, sampler=drawn, budget={"trials": trials})


def genomes(store: MemoryStore) -> list[Any]:
    return [t.genome for t in store.trials("s") if t.kind == "search"]


@pytest.mark.parametrize("schedule", ["generational", "pipelined", "asynchronous"])
def test_a_search_goes_first_to_what_an_artifact_has_learned(tiny_zoo, digests, tmp_path, schedule):
    (tmp_path / "zoo").symlink_to(tiny_zoo)
    start = averaging(tmp_path / "ada", digests, {"compare": 0.3, "sort": 0.8})
    cut, whole = MemoryStore(), MemoryStore()
    run_synthetic(starting(tiny_zoo, start, 6, schedule=schedule), cut, Inspecting())
    first = genomes(cut)[0]
    assert first == pytest.approx((0.3, 0.8), abs=1e-6)
    assert cut.study("s").inspection["start"]["distance"] < 1e-6
    pinned = cut.study("s").inspection["start"]
    spread = [
        abs(g - f) for genome in genomes(cut)[1:4] for g, f in zip(genome, first, strict=True)
    ]
    assert 0 < max(spread) < 4 * 0.1667  # the others are drawn around it

    run_synthetic(starting(tiny_zoo, start, 20, schedule=schedule), whole, Inspecting())
    report = stored_report(whole.study("s"), whole)
    assert report.to_json()["start"]["kind"] == "adamerging"
    assert any("started from what adamerging had learned in" in note for note in report.notes)
    shutil.rmtree(start)  # what the study needs of it is written into the study
    run_synthetic(starting(tiny_zoo, start, 20, schedule=schedule), cut, Inspecting())
    assert cut.study("s").inspection["start"] == pinned
    assert genomes(cut) == genomes(whole)


def test_the_start_of_a_study_stays_and_may_be_moved(tiny_zoo, digests, tmp_path):
    (tmp_path / "zoo").symlink_to(tiny_zoo)
    start = averaging(tmp_path / "ada", digests, {"compare": 0.3, "sort": 0.8})
    store = MemoryStore()
    run_synthetic(starting(tiny_zoo, start, 2), store, Inspecting())
    moved = tmp_path / "moved"
    shutil.move(start, moved)
    for trials in (3, 4):
        assert run_synthetic(starting(tiny_zoo, moved, trials), store, Inspecting())
    other = averaging(tmp_path / "other", digests, {"compare": 0.4, "sort": 0.8})
    with pytest.raises(StudyChanged, match=r"sampler.start: .*moved \(contents .*other \("):
        open_study(starting(tiny_zoo, other, 4), store, Inspecting())


def test_a_start_that_cannot_be_is_refused(tiny_zoo, digests, tmp_path):
    (tmp_path / "zoo").symlink_to(tiny_zoo)
    (line,) = problems(starting(tiny_zoo, fitted(tmp_path / "sens", digests), 4))
    assert "'sensitivity' holds no weights by source and tensor; these do: dam, " in line
    ada = averaging(tmp_path / "ada", digests, {"compare": 0.3, "sort": 0.8})
    (line,) = problems(starting(tiny_zoo, ada, 4).model_copy(update={"space": "ties_blocks"}))
    assert "sampler.start: the space's ties is not linear in weights" in line
    unlike = averaging(tmp_path / "few", digests, {"compare": 0.3})
    (line,) = problems(starting(tiny_zoo, unlike, 4))
    assert "was fitted on the sources compare; the recipe has compare, sort" in line
