"""Greedy soup against the paper's recipe, written out here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_problems
import torch
from transformers import AutoModelForCausalLM

from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import fit
from evomerge.merging.fitted.calibration import Example, batch
from evomerge.merging.fitted.greedy_soup import GreedySoupFit, GreedySoupSettings
from evomerge.merging.merge import open_merge
from evomerge.merging.recipe import ModelRef, Recipe, Source

LOSS = GreedySoupSettings(metric="loss", batch_size=3)


def _recipe(folders, artifact) -> Recipe:
    sources = [Source(n, ModelRef(p)) for n, p in folders.items() if n != "base"]
    base = ModelRef(folders["base"])
    return Recipe("greedy_soup", base, tuple(sources), artifact=ModelRef(str(artifact)))


def _loss(weights, folder, examples) -> float:
    """Minus the mean over examples of the mean loss on the answer, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights)
    merits = []
    for example in examples:
        tokens = torch.tensor([example.tokens])
        labels = tokens.clone()
        labels[:, : example.answer] = -100
        with torch.no_grad():
            merits.append(-float(model(tokens, labels=labels).loss))
    return sum(merits) / len(merits)


def test_it_picks_what_the_papers_recipe_picks(tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c", "d"))
    problem = small_problems.problem(folders)
    fit(GreedySoupFit(), problem, LOSS, tmp_path / "soup")
    examples = [e for name in problem.sources for e in problem.calibration.of(name)]
    states = {
        name: AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).state_dict()
        for name in "abcd"
    }

    def merit(names):
        mean = {k: sum(states[n][k] for n in names) / len(names) for k in states["a"]}
        return _loss(mean, folders["base"], examples)

    ranked = sorted("abcd", key=lambda name: -merit([name]))
    soup, best = ranked[:1], merit(ranked[:1])
    for name in ranked[1:]:
        if (found := merit([*soup, name])) > best:
            soup, best = [*soup, name], found
    artifact = open_artifact(tmp_path / "soup")
    assert artifact.facts["ingredients"] == sorted(soup)
    kept = [artifact.facts["alone"][ranked[0]]]
    kept += [step["merit"] for step in artifact.facts["steps"] if step["kept"]]
    assert kept == sorted(kept)  # held-out merit never falls
    assert kept[-1] == pytest.approx(best, rel=1e-5)
    merge = open_merge(_recipe(folders, tmp_path / "soup"))
    for name in merge.names:
        mean = sum(states[n][name].double() for n in soup) / len(soup)
        torch.testing.assert_close(merge.tensor(name).double(), mean, rtol=1e-6, atol=1e-8)


def test_a_copy_is_never_taken(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    problem = small_problems.problem({**folders, "b": folders["a"]})
    fit(GreedySoupFit(), problem, LOSS, tmp_path / "soup")
    assert open_artifact(tmp_path / "soup").facts["ingredients"] == ["a"]


def test_a_lone_model_is_the_soup_bit_for_bit(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    problem = small_problems.problem(folders)
    fit(GreedySoupFit(), problem, LOSS, tmp_path / "soup")
    merge = open_merge(_recipe(folders, tmp_path / "soup"))
    for name in merge.names:
        assert torch.equal(merge.tensor(name), problem.sources["a"].tensor(name))


def test_interrupted_it_goes_on_to_the_same(tmp_path, monkeypatch):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    problem = small_problems.problem(folders)
    fit(GreedySoupFit(), problem, LOSS, tmp_path / "whole")
    from evomerge.merging.fitted import greedy_soup

    counted, stir = [], greedy_soup._stir

    def interrupted(*arguments):
        counted.append(arguments)
        if len(counted) == 3:
            raise KeyboardInterrupt
        stir(*arguments)

    monkeypatch.setattr(greedy_soup, "_stir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(GreedySoupFit(), problem, LOSS, tmp_path / "soup")
    fit(GreedySoupFit(), problem, LOSS, tmp_path / "soup")
    one, other = open_artifact(tmp_path / "whole"), open_artifact(tmp_path / "soup")
    assert one.digest == other.digest
    assert len(counted) == 1 + 5  # nothing that was saved is computed again


def test_accuracy_counts_whole_answers(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    problem = small_problems.problem(folders)
    model = AutoModelForCausalLM.from_pretrained(folders["a"], dtype=torch.float32)
    tokens = [5, 6, 7]
    for _ in range(3):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    right = Example(tuple(tokens), 3)
    wrong = Example((*tokens[:-1], (tokens[-1] + 1) % 60), 3)
    data = replace(problem.calibration, examples={"a": (right, wrong)})
    assert batch([right, wrong]).counted.sum() == 6
    problem = replace(problem, calibration=data)
    fit(GreedySoupFit(), problem, GreedySoupSettings(), tmp_path / "soup")
    assert open_artifact(tmp_path / "soup").facts["alone"] == {"a": 0.5}
