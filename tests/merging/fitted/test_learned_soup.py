"""Learned soup: its gradient against autograd's, its start and its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_families
import small_problems
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from evomerge.merging.fitted import descent
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import fit
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.fitted.learned_soup import LearnedSoupFit, LearnedSoupSettings, _Training
from evomerge.merging.fitted.network import Network
from evomerge.merging.merge import open_merge
from evomerge.merging.recipe import ModelRef, Recipe, Source

AT_START = LearnedSoupSettings(epochs=0)


def _recipe(folders, method, artifact=None, **parameters):
    sources = [Source(n, ModelRef(p)) for n, p in folders.items() if n != "base"]
    fitted = ModelRef(str(artifact)) if artifact else None
    return Recipe(method, None, tuple(sources), parameters, artifact=fitted)


def _stepped(problem, settings, raw):
    """The training after one step from these coefficients, and its loss."""
    network = Network(problem.anchor)
    training = _Training(problem, settings, network)
    training.raw.copy_(raw.expand(training.raw.shape))
    with network.gradients(training.take):
        return training, training.step(0)["loss"]


def test_the_gradient_is_autograds(tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    problem = small_problems.problem(folders, with_base=False)
    start = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    settings = LearnedSoupSettings(batch_size=5)
    training, loss = _stepped(problem, settings, start)
    models = [AutoModelForCausalLM.from_pretrained(folders[n]).double() for n in "abc"]
    states = [dict(model.named_parameters()) for model in models]
    raw = start.repeat(len(training.raw), 1).requires_grad_(True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    weights = {
        name: sum(
            a * s[name].detach()
            for a, s in zip(raw[training.rows[name]].softmax(0), states, strict=True)
        )
        for name in training.names
    }
    examples = [e for name in problem.sources for e in problem.calibration.of(name)]
    batch = descent.endless_batch(examples, 0, 5, seed=0)
    given = {"input_ids": batch.tokens, "attention_mask": batch.attention, "use_cache": False}
    logits = functional_call(models[0], weights, (), given).logits[batch.counted]
    wanted = torch.nn.functional.cross_entropy(logits * beta, batch.targets[batch.counted])
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    torch.testing.assert_close(training.raw.grad, raw.grad, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(training.beta.grad, beta.grad, rtol=1e-4, atol=1e-7)
    whole, _ = _stepped(problem, settings.model_copy(update={"granularity": "model"}), start)
    total = training.raw.grad.sum(0, keepdim=True)
    torch.testing.assert_close(whole.raw.grad, total, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_the_gradient_is_the_losss_slope(family, tmp_path):
    problem = small_families.problem(family, tmp_path, count=4)
    settings = LearnedSoupSettings(batch_size=8)
    training, _ = _stepped(problem, settings, torch.zeros(2, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(training.raw.shape, generator=generator, dtype=torch.float64)
    h = 1e-3
    above, below = (_stepped(problem, settings, s * h * direction)[1] for s in (1, -1))
    slope = float((training.raw.grad * direction).sum())
    assert slope == pytest.approx((above - below) / (2 * h), rel=2e-2)


@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_it_starts_as_the_uniform_soup_bit_for_bit(blend, tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    problem = small_problems.problem(folders, with_base=False)
    settings = LearnedSoupSettings(lr=0.5) if blend == 0 else AT_START
    fit(LearnedSoupFit(), problem, settings, tmp_path / "out")
    found = open_merge(_recipe(folders, "learned_soup", tmp_path / "out", blend=blend))
    plain = open_merge(_recipe(folders, "linear"))
    for name in found.names:
        assert torch.equal(found.tensor(name), plain.tensor(name))


def test_a_lone_model_is_the_soup_bit_for_bit(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    problem = small_problems.problem(folders, with_base=False)
    fit(LearnedSoupFit(), problem, LearnedSoupSettings(lr=0.5), tmp_path / "out")
    found = open_merge(_recipe(folders, "learned_soup", tmp_path / "out"))
    for name in found.names:
        assert torch.equal(found.tensor(name), problem.sources["a"].tensor(name))


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_it_learns_which_model_gave_the_answers(granularity, tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b"))
    problem = small_problems.problem(folders, with_base=False)
    model = AutoModelForCausalLM.from_pretrained(folders["b"])
    answered = []
    for example in small_problems.examples(5, count=24):
        with torch.no_grad():
            following = model(torch.tensor([example.tokens])).logits[0, -1].argmax()
        answered.append(Example((*example.tokens, int(following)), len(example.tokens)))
    data = replace(problem.calibration, examples=dict.fromkeys("ab", tuple(answered)))
    settings = LearnedSoupSettings(lr=0.3, batch_size=24, epochs=20, granularity=granularity)
    fit(LearnedSoupFit(), replace(problem, calibration=data), settings, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    shares = torch.stack([artifact.tensor(name) for name in sorted(artifact.names)])
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares), dtype=torch.float64))
    if granularity == "model":  # tensors of their own can do better than the answers' model
        assert float(shares[:, 1].mean()) > 0.7
    curve = artifact.facts["curve"]["loss"]
    assert len(curve) == 20
    assert curve[-1] < curve[0]
    assert artifact.facts["beta"] > 1  # the answers are sure, the untrained logits are not


def test_interrupted_it_goes_on_to_the_same(tmp_path, monkeypatch):
    problem = small_problems.problem(small_problems.models(tmp_path), with_base=False)
    settings = LearnedSoupSettings(batch_size=3, epochs=3)
    monkeypatch.setattr(descent, "_STEPS_A_SAVE", 2)
    fit(LearnedSoupFit(), problem, settings, tmp_path / "whole")
    counted, step = [], _Training.step

    def interrupted(training, number):
        counted.append(number)
        if len(counted) == 6:
            raise KeyboardInterrupt
        return step(training, number)

    monkeypatch.setattr(_Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(LearnedSoupFit(), problem, settings, tmp_path / "out")
    fit(LearnedSoupFit(), problem, settings, tmp_path / "out")
    assert open_artifact(tmp_path / "out").digest == open_artifact(tmp_path / "whole").digest
    assert counted == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
