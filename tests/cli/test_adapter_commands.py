"""Adapters from the command line: what is written and said, and what is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_adapters
import torch

from evomerge.checkpoints.adapter import Adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    base = small_adapters.llama(root / "base")
    paths = {"base": base, "other": small_adapters.llama(root / "other", seed=3)}
    for seed, name in enumerate(("one", "two")):
        lora = {"target_modules": ["q_proj"], "r": 2 + seed}
        paths[name] = small_adapters.train(base, root / name, seed=seed, **lora)
    return {name: str(path) for name, path in paths.items()}


def test_extract_tells_what_was_kept(call: Any, models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, errors = call(
        "extract-lora", models["base"], models["other"], out, "--rank", 3, "--json"
    )
    assert code == 0
    assert f"wrote {out}" in errors
    document = json.loads(said)
    assert {change["rank"] for change in document["kept"]} == {3}
    assert 0 < document["share"] < 1
    assert document["lost"] == []
    assert len(Adapter.open(str(out)).factors) == len(document["kept"])


def test_extract_takes_a_model_behind_an_adapter(
    call: Any, models: dict[str, str], tmp_path: Path
) -> None:
    model = f"{models['base']}+{models['one']}"
    code, said, _ = call("extract-lora", models["base"], model, tmp_path / "out", "--energy", 0.999)
    assert code == 0
    assert said.startswith("100.0% of the change")
    assert {f.rank for f in Adapter.open(str(tmp_path / "out")).factors.values()} <= {1, 2}


@pytest.mark.parametrize(
    ("options", "weights", "rank"),
    [([], (0.5, 0.5), 5), (["--weight", "2", "--weight", "-0.5"], (2, -0.5), 5)],
)
def test_merge_adds_the_adapters_up(
    options: list[str],
    weights: tuple[float, float],
    rank: int,
    call: Any,
    models: dict[str, str],
    tmp_path: Path,
) -> None:
    names = ("one", "two")
    code, _, _ = call("merge-adapters", *(models[n] for n in names), tmp_path / "out", *options)
    assert code == 0
    parts = [Adapter.open(models[name]).factors for name in names]
    for module, merged in Adapter.open(str(tmp_path / "out")).factors.items():
        exact = sum(
            w * p[module].scale * p[module].b @ p[module].a
            for w, p in zip(weights, parts, strict=True)
        )
        torch.testing.assert_close(merged.b @ merged.a, exact, rtol=1e-5, atol=1e-7)
        assert merged.rank == rank


def test_merge_to_a_rank(call: Any, models: dict[str, str], tmp_path: Path) -> None:
    adapters = models["one"], models["two"]
    code, said, _ = call("merge-adapters", *adapters, tmp_path / "out", "--rank", 2)
    assert code == 0
    assert "loses most" in said
    assert {f.rank for f in Adapter.open(str(tmp_path / "out")).factors.values()} == {2}


def test_faults_are_one_line(call: Any, models: dict[str, str], tmp_path: Path) -> None:
    base, other, one = (models[name] for name in ("base", "other", "one"))
    out = tmp_path / "out"
    faults = {
        "has no adapter_config.json": ("merge-adapters", one, base, out),
        "2 adapters, but 1 weights": ("merge-adapters", one, one, out, "--weight", 1),
        "finite": ("merge-adapters", one, out, "--weight", "nan"),
        "not a regular expression": ("extract-lora", base, other, out, "--only", "("),
        "no linear weight differs": ("extract-lora", base, base, out),
        "exists already": ("extract-lora", base, other, tmp_path),
    }
    (tmp_path / "mine").write_text("")
    for reason, arguments in faults.items():
        code, said, errors = call(*arguments)
        assert code == 2, reason
        assert said == ""
        last = errors.strip().splitlines()[-1]  # after a progress bar, if work had begun
        assert last.startswith("evomerge: ")
        assert reason in last
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
