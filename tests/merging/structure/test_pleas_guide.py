"""The guide to PLeaS: its example runs, its recipe is one, what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import tiny_models
import torch
import yaml

from evomerge.calibration.request import load_request
from evomerge.merging.fitted.registry import FITTERS
from evomerge.merging.structure.networks.merge import Refitting
from evomerge.merging.structure.networks.pair import Likeness, Statistic
from evomerge.merging.structure.networks.pleas_networks import Allocation, Amount

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "pleas.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_the_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, str(GUIDE), "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"1\.(2\d|30) of one network; widths \{'0': \d+, '3': \d+\}", first)
    assert second == "True"
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "model.safetensors",
        "pleas.json",
    }


def test_the_recipe_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    document = yaml.safe_load(text)
    for name, seed in (("first", 1), ("second", 2)):
        model = tiny_models.causal("llama", seed=seed, dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        document["sources"][name] = str(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    request = load_request(tmp_path / "recipe.yaml")
    assert request.fitter is FITTERS["pleas"]
    assert set(document["calibration"]) == set(document["sources"])


def test_every_choice_is_told_of():
    choices = (*get_args(Statistic), "weights", "identity", *get_args(Allocation))
    choices += ("reset", "kept", "repair", *Amount.model_fields)
    assert set(get_args(get_args(Likeness)[0])) | {*get_args(Statistic)} <= {*choices}
    told = set(re.findall(r"[`\"](\w+)[`\"]", TEXT))
    assert {*choices} - told == set()
    assert Refitting().least_squares.form == "parallel"
