"""A worker compares itself with the one that the study was started with."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from evomerge.errors import VersionMismatch
from evomerge.service import worker as module
from evomerge.service.worker import Worker
from evomerge.testing.synthetic import synthetic_spec

HERE = {"torch": "2.13.0", "transformers": "5.23.0"}
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package not in HERE:
            raise module.PackageNotFoundError(package)
        return HERE[package]

    monkeypatch.setattr(module, "version", version)


def prepare(**changes: Any) -> None:
    spec = synthetic_spec(evaluation={"device": "cpu"}).model_dump(mode="json")
    study = {"packages": HERE, "python": PYTHON, "device": "cpu", "scorer": 2}
    Worker("gpu-7").prepare(spec, {}, "float32", {**study, **changes})


def test_a_worker_like_the_first_is_prepared() -> None:
    prepare()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"packages": {**HERE, "torch": "2.12.1"}}, "torch is 2.13.0 here and 2.12.1 in the study"),
        ({"packages": {"lm_eval": "0.4.13"}}, "lm_eval is missing here and 0.4.13 in the study"),
        ({"python": "3.1"}, f"python is {PYTHON} here and 3.1 in the study"),
        ({"device": "cuda"}, "device is cpu here and cuda in the study"),
    ],
)
def test_one_that_would_score_otherwise_refuses(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(VersionMismatch) as refusal:
        prepare(**changes)
    assert str(refusal.value) == (
        f"worker gpu-7 would score otherwise: {line}; "
        "give every worker what the study was started with"
    )


def test_every_difference_is_named_on_one_line() -> None:
    with pytest.raises(VersionMismatch) as refusal:
        prepare(packages=dict.fromkeys(HERE, "1.0"), python="3.1")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).count(" in the study") == 3
