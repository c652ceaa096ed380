"""The model that a worker keeps, when a candidate is wider: all but its shapes is as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_llama
import tiny_models
import torch

from evomerge.checkpoints.adapted import open_model
from evomerge.service import resident
from evomerge.service.resident import Resident


def test_a_wider_model_ends_its_texts_where_the_base_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generation_config.json may name more ends than config.json."""
    base = tiny_models.causal("llama", dtype=torch.float32)
    base.generation_config.eos_token_id = [2, 5]
    base.save_pretrained(tmp_path)
    small_llama.tokenizer().save_pretrained(tmp_path)
    config = open_model(str(tmp_path)).config
    wider = {**config, "intermediate_size": 2 * config["intermediate_size"]}
    made = SimpleNamespace(anchor=SimpleNamespace(path="wider", config=wider))
    monkeypatch.setattr(resident, "load_tasks", lambda objective: None)
    monkeypatch.setattr(resident, "Merge", lambda recipe, models: made)
    monkeypatch.setattr(resident, "ResidentScorer", lambda model, *_, **__: model)
    monkeypatch.setattr(resident, "Materialiser", lambda *_, **__: SimpleNamespace(write=print))
    spec: Any = SimpleNamespace(base=str(tmp_path), sources={}, objective=None, evaluation=None)
    kept = Resident(spec, "float32", ["cpu"], lambda: None)
    recipe: Any = SimpleNamespace(method="pleas")
    model: Any = kept.fitting(recipe)[1]
    assert model.config.intermediate_size == wider["intermediate_size"]
    assert model.generation_config.eos_token_id == [2, 5]
