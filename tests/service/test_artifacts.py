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

from evomerge.checkpoints.adapted import open_model
from evomerge.errors import SpecError, StudyChanged
from evomerge.merging.fitted.artifact import DOCUMENT, Provenance, draft, open_artifact
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.scoring.splits import part_of
from evomerge.scoring.tasks import load_tasks
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
