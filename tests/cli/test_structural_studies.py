"""Studies whose candidates have another structure than their sources, with real workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from commands import done
from safetensors.torch import load_file
from transformers import AutoTokenizer

from evomerge.checkpoints.adapted import open_model
from evomerge.merging.materialise import load_model
from evomerge.scoring.resident import ResidentScorer
from evomerge.spec import Evaluation, Objective

pytestmark = pytest.mark.slow


def _fit(folder: Path, zoo: Path, method: str, sources: dict[str, str]) -> Path:
    recipe = folder / "recipe.yaml"
    document = {
        "method": method,
        "base": next(iter(sources.values())),
        "sources": sources,
        "calibration": {"text": str(zoo / "text.txt"), "tokens": 8, "count": 12},
    }
    recipe.write_text(yaml.safe_dump(document))
    code, _, err = done(folder, "fit", recipe, folder / "artifact")
    assert code == 0, err
    return folder / "artifact"


def _run(folder: Path, zoo: Path, sources: dict[str, str], **keys: Any) -> str:
    """The study's final table."""
    spec = {
        "name": "s",
        "base": next(iter(sources.values())),
        "sources": sources,
        "artifact": str(folder / "artifact"),
        "objective": {"include_path": str(zoo / "tasks"), "tasks": ["compare"]},
        "sampler": {"name": "cmaes", "population": 4, "seed": 0},
        "budget": {"trials": 8, "finalists": 2},
        **keys,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))
    code, out, err = done(folder, "run", folder / "study.yaml")
    assert code == 0, err
    return out


def _trials(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done(folder, "trials", "s", "--json")[1])
    return found


@pytest.fixture(scope="module")
def zoo(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo's tasks, and text in the words of its tokenizer."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "tasks").symlink_to(tiny_zoo / "tasks")
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / "base")
    tokens = torch.randint(5, len(tokenizer), (400,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(tokenizer.decode(tokens.tolist()))
    return folder


def _model(zoo: Path, family: str, place: Path, seed: int = 0) -> str:
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = tiny_models.causal(family, seed=seed, dtype=torch.float32, **words)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_experts_kept_per_layer_are_searched_and_the_winner_is_exported(
    tiny_zoo: Path, zoo: Path, tmp_path: Path
) -> None:
    sources = {"mixtral": _model(tiny_zoo, "mixtral", tmp_path / "mixtral")}
    _fit(tmp_path, zoo, "m_smoe", sources)
    space = {
        "method": "m_smoe",
        "recipe": {
            "keep": 2.0,
            "allocation": "shares",
            "share": [{"blocks": 2, "low": 0.25, "high": 4.0, "init": 1.0, "scale": "log"}],
            "exponent": [{"low": 0.0, "high": 3.0, "init": 1.0}],
        },
    }
    table = _run(tmp_path, zoo, sources, space=space)
    assert "| as published " in table
    assert "than the m_smoe as published" in table or "from the m_smoe as published" in table
    trials = _trials(tmp_path)
    kinds = [trial["kind"] for trial in trials]
    assert kinds == ["base", "published", *["search"] * 8]
    assert all(trial["state"] == "COMPLETE" for trial in trials), trials
    code, _, err = done(tmp_path, "best", "s", "--export", tmp_path / "winner")
    assert code == 0, err
    made = load_file(tmp_path / "winner" / "model.safetensors")
    original = load_file(tmp_path / "mixtral" / "model.safetensors")
    changed = {name for name in original if not torch.equal(made[name], original[name])}
    assert changed
    assert all(".experts." in name for name in changed)


def test_what_stays_apart_is_searched_and_the_winner_is_wider(
    tiny_zoo: Path, zoo: Path, tmp_path: Path
) -> None:
    """Candidates of other widths than the base, one after another and between baselines."""
    sources = {
        name: _model(tiny_zoo, "llama", tmp_path / name, seed=seed)
        for name, seed in (("one", 1), ("two", 2))
    }
    _fit(tmp_path, zoo, "pleas", sources)
    space = {
        "method": "pleas",
        "recipe": {
            "budget": [{"low": 1.0, "high": 1.4, "init": 1.2}],
            "allocation": "shares",
            "share": [{"blocks": 2, "low": 0.1, "high": 10.0, "init": 1.0, "scale": "log"}],
        },
    }
    table = _run(tmp_path, zoo, sources, space=space)
    assert "| as published " in table
    trials = _trials(tmp_path)
    kinds = [trial["kind"] for trial in trials]
    assert kinds == ["base", "source", "uniform", "published", *["search"] * 8]
    assert all(trial["state"] == "COMPLETE" for trial in trials), trials
    code, _, err = done(tmp_path, "best", "s", "--export", tmp_path / "winner")
    assert code == 0, err
    config = json.loads((tmp_path / "winner" / "config.json").read_text())
    narrow = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["intermediate_size"] > narrow["intermediate_size"]
    best = json.loads(done(tmp_path, "best", "s", "--json")[1])
    (winner,) = (trial for trial in trials if trial["number"] == best["number"])
    objective = Objective.model_validate({"include_path": str(zoo / "tasks"), "tasks": ["compare"]})
    live, tokenizer = load_model(open_model(str(tmp_path / "winner")))
    scorer = ResidentScorer(live, tokenizer, objective, Evaluation())
    for part, scores in winner["scores"].items():
        assert scorer.score(part).tasks["compare"].value == scores["compare"], part
