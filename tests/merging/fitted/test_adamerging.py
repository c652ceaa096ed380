"""AdaMerging: its gradient against autograd's, its selection against the authors' rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_families
import small_problems
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from evomerge.errors import UserError
from evomerge.merging.fitted import descent
from evomerge.merging.fitted.adamerging import (
    AdaMergingFit,
    AdaMergingSettings,
    _Selection,
    _Training,
    divergence,
    entropy,
)
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import fit
from evomerge.merging.fitted.network import Network
from evomerge.merging.merge import open_merge
from evomerge.merging.recipe import ModelRef, Recipe, Source

AT_START = AdaMergingSettings(steps=0)


def _training(problem, settings):
    network = Network(problem.anchor)
    selection = _Selection.of(problem, network, settings) if settings.plus_plus else None
    return network, _Training(problem, settings, network, selection)


def _gradient(problem, settings):
    """What one step leaves for Adam, and the coefficients' training."""
    network, training = _training(problem, settings)
    with network.gradients(training.take):
        losses = training.step(0)
    return training.raw.grad.clone(), training, losses


def _recipe(folders, method, artifact=None, **parameters):
    sources = [Source(n, ModelRef(p)) for n, p in folders.items() if n != "base"]
    fitted = ModelRef(str(artifact)) if artifact else None
    base = ModelRef(folders["base"])
    return Recipe(method, base, tuple(sources), parameters, artifact=fitted)


def _states(folders, names):
    models = {n: AutoModelForCausalLM.from_pretrained(folders[n]).double() for n in names}
    return models["base"], {n: dict(model.named_parameters()) for n, model in models.items()}


@pytest.mark.parametrize("loss", ["entropy", "kl"])
def test_the_gradient_is_autograds(loss, tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    problem = small_problems.problem(folders)
    settings = AdaMergingSettings(loss=loss, batch_size=4)
    found, training, losses = _gradient(problem, settings)
    model, states = _states(folders, ("base", "a", "b", "c"))
    raw = torch.full(found.shape, 0.3, dtype=torch.float64, requires_grad=True)
    total = 0.0
    for source in problem.sources:
        batch = training._batch(source, 0)
        rows = {name: raw.clamp(0, 1)[training.rows[name]] for name in training.names}
        weights = {
            name: states["base"][name].detach()
            + sum(
                rows[name][i] * (states[s][name] - states["base"][name]).detach()
                for i, s in enumerate(problem.sources)
            )
            for name in training.names
        }
        given = {"input_ids": batch.tokens, "attention_mask": batch.attention, "use_cache": False}
        logits = functional_call(model, weights, (), given).logits[batch.counted]
        if loss == "entropy":
            term = torch.distributions.Categorical(logits=logits).entropy().mean()
        else:
            with torch.no_grad():
                told = functional_call(model, states[source], (), given).logits[batch.counted]
            pair = [torch.distributions.Categorical(logits=z) for z in (told, logits)]
            term = torch.distributions.kl_divergence(*pair).mean()
        assert losses[source] == pytest.approx(float(term.detach()), rel=1e-5)
        total = total + term
    total.backward()
    torch.testing.assert_close(found, raw.grad, rtol=1e-3, atol=1e-6)
    whole, _, _ = _gradient(problem, settings.model_copy(update={"granularity": "task"}))
    torch.testing.assert_close(whole, found.sum(0, keepdim=True), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "plus_plus"),
    [
        ("llama-tied", False),
        ("llama-tied", True),
        ("gpt2", True),
        ("qwen2", True),
        ("mixtral", False),  # a router that changes its mind makes the loss jump
    ],
)
def test_the_gradient_is_the_losss_slope(family, plus_plus, tmp_path):
    problem = small_families.problem(family, tmp_path, count=4)
    settings = AdaMergingSettings(loss="kl", plus_plus=plus_plus, batch_size=4)
    found, training, _ = _gradient(problem, settings)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).double()
    h, values = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            training.raw.copy_(0.3 + sign * h * direction)
        with training._network.gradients(lambda name, gradient: None):
            values.append(sum(training.step(0).values()))
    slope = (values[0] - values[1]) / (2 * h)
    assert float((found * direction).sum()) == pytest.approx(slope, rel=2e-2)


def test_it_starts_as_task_arithmetic_bit_for_bit(tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    fit(AdaMergingFit(), small_problems.problem(folders), AT_START, tmp_path / "out")
    found = open_merge(_recipe(folders, "adamerging", tmp_path / "out"))
    plain = open_merge(_recipe(folders, "task_arithmetic", weight=0.3))
    for name in found.names:
        assert torch.equal(found.tensor(name), plain.tensor(name))


def test_a_lone_source_of_coefficient_one_is_that_source(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    problem = small_problems.problem(folders)
    fit(AdaMergingFit(), problem, AdaMergingSettings(steps=0, init=1.0), tmp_path / "out")
    found = open_merge(_recipe(folders, "adamerging", tmp_path / "out"))
    for name in found.names:
        assert torch.equal(found.tensor(name), problem.sources["a"].tensor(name))


def test_outside_the_clamp_nothing_is_learned(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    settings = AdaMergingSettings(init=1.5, steps=2)
    assert not _gradient(problem, settings)[0].any()
    assert _gradient(problem, settings.model_copy(update={"clamp": False}))[0].all()
    fit(AdaMergingFit(), problem, settings, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    assert (artifact.facts["at_zero"], artifact.facts["at_one"]) == (0.0, 1.0)
    assert all(bool((artifact.tensor(name) == 1).all()) for name in artifact.names)


def test_the_losses_are_what_they_are_called():
    logits, told = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0)).double()
    one, other = (torch.distributions.Categorical(logits=z) for z in (logits, told))
    torch.testing.assert_close(entropy(logits), one.entropy().mean())
    wanted = torch.distributions.kl_divergence(other, one).mean()
    torch.testing.assert_close(divergence(told, logits), wanted)
    certain = torch.tensor([[0.0, 200.0]])
    assert float(entropy(certain)) == 0
    assert float(divergence(logits, logits)) == 0


@pytest.mark.parametrize("loss", ["entropy", "kl"])
def test_the_loss_falls(loss, tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    settings = AdaMergingSettings(loss=loss, steps=30, lr=0.02, batch_size=4)
    fit(AdaMergingFit(), problem, settings, tmp_path / "out")
    curve = open_artifact(tmp_path / "out").facts["curve"]
    assert sum(steps[-1] for steps in curve.values()) < sum(steps[0] for steps in curve.values())
    assert all(len(steps) == 30 for steps in curve.values())


@pytest.mark.parametrize("settings", [{}, {"loss": "kl", "plus_plus": True}])
def test_interrupted_it_goes_on_to_the_same(settings, tmp_path, monkeypatch):
    problem = small_problems.problem(small_problems.models(tmp_path))
    settings = AdaMergingSettings(steps=9, lr=0.02, batch_size=3, **settings)
    monkeypatch.setattr(descent, "_STEPS_A_SAVE", 2)
    fit(AdaMergingFit(), problem, settings, tmp_path / "whole")
    counted, step = [], _Training.step

    def interrupted(training, number):
        counted.append(number)
        if len(counted) == 6:
            raise KeyboardInterrupt
        return step(training, number)

    monkeypatch.setattr(_Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(AdaMergingFit(), problem, settings, tmp_path / "out")
    fit(AdaMergingFit(), problem, settings, tmp_path / "out")
    assert open_artifact(tmp_path / "out").digest == open_artifact(tmp_path / "whole").digest
    assert counted == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]


def test_batches_go_round_by_round():
    examples = small_problems.examples(0, count=5)
    seen = [
        tuple(row.tolist())
        for step in range(5)
        for row in descent.endless_batch(examples, step, 3, seed=1).tokens
    ]
    rounds = [seen[i : i + 5] for i in range(0, 15, 5)]
    assert all(set(each) == {e.tokens for e in examples} for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_plus_plus_is_the_authors_selection(tmp_path):
    """Flattened in the order of names, trimmed over the model, elected, split without a mean."""
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    problem = small_problems.problem(folders)
    settings = AdaMergingSettings(steps=0, plus_plus=True, density=0.3, init=0.4)
    fit(AdaMergingFit(), problem, settings, tmp_path / "out")
    found = open_merge(_recipe(folders, "adamerging", tmp_path / "out", scale=0.5))
    names = sorted(found.names)
    base = torch.cat([problem.base.tensor(n).flatten() for n in names])
    taus = torch.stack(
        [torch.cat([m.tensor(n).flatten() for n in names]) - base for m in problem.sources.values()]
    )
    size = taus.shape[1]
    kept = []
    for tau in taus:
        threshold = tau.abs().kthvalue(size - int(size * 0.3)).values
        kept.append(torch.where(tau.abs() >= threshold, tau, 0.0))
    stacked = torch.stack(kept)
    elected = stacked.sum(0).sign()
    elected[elected == 0] = elected.sum().sign()
    agreed = torch.where(torch.where(elected > 0, stacked > 0, stacked < 0), stacked, 0.0)
    wanted = base.double() + 0.2 * agreed.double().sum(0)
    merged = torch.cat([found.tensor(n).flatten() for n in names])
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-6, atol=1e-8)


def test_too_little_data_is_one_line(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    bare = replace(problem, calibration=replace(problem.calibration, examples={}))
    with pytest.raises(UserError, match="calibration of source 'a': 0 examples"):
        fit(AdaMergingFit(), bare, AdaMergingSettings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
