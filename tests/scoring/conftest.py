"""Fixtures of the scorer's tests."""

from __future__ import annotations

import pytest
from small_exam import Exam, greedy, random_llama, write_tasks

from evomerge.zoo.vocabulary import build_tokenizer


@pytest.fixture(scope="session")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Exam:
    """Build it once; half of the answers are what the model itself says, so outcomes differ."""
    folder = tmp_path_factory.mktemp("exam")
    model, tokenizer = random_llama(seed=1), build_tokenizer(64)
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    write_tasks(folder / "tasks", lambda prompt: greedy(model, tokenizer, prompt))
    return Exam(folder / "checkpoint", folder / "tasks")
