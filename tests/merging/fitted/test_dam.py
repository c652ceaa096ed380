"""The fit of DAM: its invariances, its curve, resuming, teachers' caches, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import small_problems
import torch

from evomerge.errors import MergeError, UserError
from evomerge.merging.fitted import dam as dam_module
from evomerge.merging.fitted import dam_losses as losses
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import Watch, fit, merged_names
from evomerge.merging.fitted.calibration import Calibration, Example, batch
from evomerge.merging.fitted.dam import DamFit, DamSettings
from evomerge.merging.fitted.dam_training import Training, make_mergers
from evomerge.merging.fitted.network import Network
from evomerge.merging.fitted.teacher import Live
from evomerge.merging.merge import open_merge
from evomerge.merging.methods.mergers import collapse
from evomerge.merging.recipe import ModelRef, Recipe, Source

EVERYTHING = ("linears", "embeddings", "norms", "biases")
QUICK = DamSettings(steps=6, batch_size=2, learning_rate=0.02, train=EVERYTHING)


def _recipe(folders: Mapping[str, str], artifact: Path, **parameters: float) -> Recipe:
    sources = tuple(Source(n, ModelRef(p)) for n, p in folders.items() if n != "base")
    return Recipe(
        "dam", ModelRef(folders["base"]), sources, parameters, artifact=ModelRef(str(artifact))
    )


def _merged(folders: Mapping[str, str], artifact: Path, **parameters: float):
    merge = open_merge(_recipe(folders, artifact, **parameters))
    return {name: merge.tensor(name) for name in merge.names}


def test_one_source_with_its_own_logits_stays_itself_bit_for_bit(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    problem = small_problems.problem(folders)
    fit(DamFit(), problem, QUICK, tmp_path / "dam")
    artifact = open_artifact(tmp_path / "dam")
    assert max(artifact.facts["curve"]["terms"]["kl/a"]) == 0
    for name in artifact.names:
        assert torch.equal(artifact.tensor(name), torch.ones_like(artifact.tensor(name)))
    for name, tensor in _merged(folders, tmp_path / "dam").items():
        assert torch.equal(tensor, problem.sources["a"].tensor(name))


def test_identical_sources_merge_to_that_source(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    folders = {**folders, "b": folders["a"], "c": folders["a"]}
    problem = small_problems.problem(folders)
    random_start = QUICK.model_copy(update={"initial": "random", "steps": 1})
    network = Network(problem.anchor)
    mergers = make_mergers(network, problem, random_start)
    assert len({float(m[0, 0]) for m in mergers.m.values()}) > 5
    for name in merged_names(problem):
        expert = problem.sources["a"].tensor(name)
        torch.testing.assert_close(mergers.weight(name), expert, rtol=1e-6, atol=1e-7)


def test_training_lowers_the_loss_and_the_merge_is_what_was_trained(tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    problem = small_problems.problem(folders)
    settings = QUICK.model_copy(update={"steps": 40, "similarity": 0.0, "anchor": "base"})
    fit(DamFit(), problem, settings, tmp_path / "dam")
    artifact = open_artifact(tmp_path / "dam")
    curve = artifact.facts["curve"]["terms"]["loss"]
    assert len(curve) == 40
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    network = Network(problem.anchor)
    training = Training(network, problem, settings, Watch())
    for _ in range(40):
        training.advance()
    training.mergers.write(network)
    rows = batch(problem.calibration.of("a"))
    with torch.no_grad():
        trained = network.logits(rows)
        for name, tensor in _merged(folders, tmp_path / "dam").items():
            network.write(name, tensor)
        assert torch.equal(network.logits(rows), trained)


def test_a_step_is_adamws_of_the_clipped_gradient(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    settings = DamSettings(steps=1, batch_size=4, similarity=0.0, tokens="answer",
                           optimizer="adamw", max_grad_norm=1e-4, learning_rate=0.1)  # fmt: skip
    training = Training(Network(problem.anchor), problem, settings, Watch())
    before = {key: m.clone() for key, m in training.mergers.m.items()}
    training.advance()
    mergers = make_mergers(Network(problem.anchor), problem, settings)
    network = Network(problem.anchor)
    teachers = Live(network, problem, "answer").of({n: range(4) for n in problem.sources})
    mergers.write(network)
    with network.gradients(mergers.take):
        for name, teacher in teachers.items():
            rows = batch(problem.calibration.of(name))
            loss = losses.kl(network.logits(rows)[rows.counted], teacher, 2.0)
            network.backward(loss, rows, what="test")
    gradients = mergers.gradients()
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm > 1e-3
    for key, m in training.mergers.m.items():
        clipped = gradients[key] * (1e-4 / norm)
        wanted = before[key] - 0.1 * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(m, wanted, rtol=2e-2, atol=2e-3)


def test_padding_changes_no_loss(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path), count=2)
    short = Example(problem.calibration.of("a")[1].tokens[:4])
    data = {**problem.calibration.examples, "a": (problem.calibration.of("a")[0], short)}
    problem = replace(problem, calibration=replace(problem.calibration, examples=data))
    network = Network(problem.anchor)
    rows = batch(problem.calibration.of("a"))
    noisy = replace(rows, tokens=torch.where(rows.attention.bool(), rows.tokens, 17))
    assert not torch.equal(noisy.tokens, rows.tokens)
    mask = rows.attention.bool()
    network.become(problem.sources["a"], merged_names(problem))
    with torch.no_grad():
        assert torch.equal(network.logits(rows)[mask], network.logits(noisy)[mask])


def test_permuted_sources_have_permuted_coefficients(tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    swapped = {"base": folders["base"], "a": folders["c"], "b": folders["a"], "c": folders["b"]}
    one, other = small_problems.problem(folders), small_problems.problem(swapped)
    examples = one.calibration.examples
    moved = {"a": examples["c"], "b": examples["a"], "c": examples["b"]}
    other = replace(other, calibration=replace(other.calibration, examples=moved))
    settings = QUICK.model_copy(update={"optimizer": "adamw"})
    fit(DamFit(), one, settings, tmp_path / "one")
    fit(DamFit(), other, settings, tmp_path / "other")
    first, second = open_artifact(tmp_path / "one"), open_artifact(tmp_path / "other")
    for name in first.names:
        torch.testing.assert_close(
            second.tensor(name), first.tensor(name)[[2, 0, 1]], rtol=1e-3, atol=2e-3
        )
    loss = [a.facts["curve"]["terms"]["loss"] for a in (first, second)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-4)


def test_no_model_is_changed_and_none_keeps_a_gradient(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    digests = dict(problem.digests)
    network = Network(problem.anchor)
    training = Training(network, problem, QUICK, Watch())
    training.advance()
    assert all(p.grad is None and not p.requires_grad for p in network.model.parameters())
    assert not any(m.requires_grad for m in training.mergers.m.values())
    models = [problem.base, *problem.sources.values()]
    assert {m.path: m.scan().digest for m in models} == digests


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "mofo"},
        {"optimizer": "adamw", "weight_decay": 0.1, "teacher": "cached", "top_k": 5},
        {"granularity": "layer", "anchor": "base", "checkpointing": True, "mse": 0.5},
    ],
)
def test_interrupted_it_goes_on_to_the_same_bit_for_bit(given, tmp_path, monkeypatch):
    problem = small_problems.problem(small_problems.models(tmp_path))
    settings = QUICK.model_copy(update=given)
    fit(DamFit(), problem, settings, tmp_path / "whole")
    monkeypatch.setattr(dam_module, "_SAVE_EVERY_S", 0.0)
    advanced, advance = [], Training.advance

    def interrupted(training: Training) -> None:
        advanced.append(training.step)
        if len(advanced) == 4:
            raise KeyboardInterrupt
        advance(training)

    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(DamFit(), problem, settings, tmp_path / "dam")
    fit(DamFit(), problem, settings, tmp_path / "dam")
    assert advanced == [0, 1, 2, 3, 3, 4, 5]
    assert open_artifact(tmp_path / "dam").digest == open_artifact(tmp_path / "whole").digest


def test_a_cache_of_the_whole_vocabulary_is_a_live_teacher(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    fit(DamFit(), problem, QUICK, tmp_path / "live")
    cached = QUICK.model_copy(update={"teacher": "cached", "top_k": 1000})
    fit(DamFit(), problem, cached, tmp_path / "cached")
    one, other = (open_artifact(tmp_path / n) for n in ("live", "cached"))
    for term, values in one.facts["curve"]["terms"].items():
        assert other.facts["curve"]["terms"][term] == pytest.approx(values, rel=1e-3, abs=1e-7)


def test_a_cache_is_gone_on_with_and_used_again_and_refused_for_others(tmp_path, monkeypatch):
    folders = small_problems.models(tmp_path)
    problem = small_problems.problem(folders)
    settings = QUICK.model_copy(update={"teacher": "cached", "top_k": 5})
    fit(DamFit(), problem, settings, tmp_path / "in-memory")
    settings = settings.model_copy(update={"cache": tmp_path / "cache"})
    loaded, really = [], Network.become

    def interrupted(network, model, names):
        loaded.append(Path(model.path).name)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        really(network, model, names)

    monkeypatch.setattr(Network, "become", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(DamFit(), problem, settings, tmp_path / "one")
    fit(DamFit(), problem, settings, tmp_path / "one")
    assert loaded == ["a", "b", "b"]
    fit(DamFit(), problem, settings, tmp_path / "two")
    assert loaded == ["a", "b", "b"]
    digests = {open_artifact(tmp_path / n).digest for n in ("in-memory", "one", "two")}
    assert len(digests) == 1
    swapped = small_problems.problem({**folders, "b": folders["base"]})
    with pytest.raises(MergeError, match=r"a teacher cache made for other sources;.* `cache`"):
        fit(DamFit(), swapped, settings, tmp_path / "three")
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("given", [{"overlap": 1e-2}, {"weighted_overlap": 1e-2},
                                   {"l1": 1e-2, "l2": 1e-2}, {"entropy": 0.1, "kl": 0.0},
                                   {"mse": 1.0, "kl": 0.0, "similarity": 0.0}])  # fmt: skip
def test_every_loss_has_its_curve_and_moves_coefficients(given, tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    settings = QUICK.model_copy(update=given)
    fit(DamFit(), problem, settings, tmp_path / "dam")
    artifact = open_artifact(tmp_path / "dam")
    terms = artifact.facts["curve"]["terms"]
    names = {term.partition("/")[0] for term in terms}
    weighted = {k for k in ("kl", "similarity", *given) if getattr(settings, k)}
    assert names == {"loss", *weighted}
    weights = {term: getattr(settings, term.partition("/")[0], 1.0) for term in terms}
    for step, loss in enumerate(terms["loss"]):
        parts = sum(weights[t] * v[step] for t, v in terms.items() if t != "loss")
        assert loss == pytest.approx(parts, rel=1e-4)
    moved = max(float((artifact.tensor(n) - 0.5).abs().max()) for n in artifact.names)
    assert moved > 1e-3


def test_a_long_curve_is_the_mean_of_runs_of_steps(tmp_path, monkeypatch):
    from evomerge.merging.fitted import dam_training

    problem = small_problems.problem(small_problems.models(tmp_path))
    fit(DamFit(), problem, QUICK, tmp_path / "whole")
    monkeypatch.setattr(dam_training, "_CURVE_POINTS", 4)
    fit(DamFit(), problem, QUICK, tmp_path / "short")
    long, short = (open_artifact(tmp_path / n).facts["curve"] for n in ("whole", "short"))
    assert (long["every"], short["every"]) == (1, 2)
    loss = long["terms"]["loss"]
    assert short["terms"]["loss"] == pytest.approx([sum(loss[i : i + 2]) / 2 for i in (0, 2, 4)])


def test_what_is_not_trained_is_averaged_and_collapses_to_its_share(tmp_path):
    folders = small_problems.models(tmp_path)
    problem = small_problems.problem(folders)
    fit(DamFit(), problem, QUICK.model_copy(update={"train": ("norms",)}), tmp_path / "dam")
    artifact = open_artifact(tmp_path / "dam")
    assert artifact.names == set(artifact.facts["axes"])
    assert all("norm" in name for name in artifact.names)
    genome = collapse(artifact, ["b", "a"])
    assert set(genome["a"]) == set(merged_names(problem))
    assert genome["b"]["model.embed_tokens.weight"] == 0.5
    name = "model.norm.weight"
    assert genome["b"][name] == pytest.approx(float(artifact.tensor(name)[1].mean()))
    merged = _merged(folders, tmp_path / "dam")["model.embed_tokens.weight"]
    mean = sum(m.tensor("model.embed_tokens.weight") * 0.5 for m in problem.sources.values())
    torch.testing.assert_close(merged, mean)


def test_plain_refusals(tmp_path):
    folders = small_problems.models(tmp_path)
    problem, alone = (
        small_problems.problem(folders),
        small_problems.problem(folders, with_base=False),
    )
    one = replace(problem, sources={"a": problem.sources["a"]})
    nobody = replace(problem, calibration=Calibration({"a": ()}, {}))
    cases = [
        (alone, {"anchor": "base"}, UserError, "give the recipe a `base`"),
        (alone, {"weighted_overlap": 1.0}, UserError, "give the recipe a `base`"),
        (problem, {"cache": tmp_path / "c"}, UserError, "add `teacher: cached`"),
        (problem, {"kl": 0.0}, UserError, "no loss looks at the data"),
        (problem, {"train": ("biases",)}, UserError, "the model has no biases to train"),
        (one, {"non_linearity": "tanh"}, MergeError, r"no finite m has tanh\(m\) = 1"),
        (nobody, {}, UserError, "0 examples, at least 1"),
    ]
    for given, settings, error, message in cases:
        with pytest.raises(error, match=message):
            fit(DamFit(), given, QUICK.model_copy(update=settings), tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))


def test_nan_is_one_line_that_says_when(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path))
    wild = QUICK.model_copy(update={"learning_rate": 1e38, "optimizer": "adamw"})
    with pytest.raises(MergeError, match="dam, step 2"):
        fit(DamFit(), problem, wild, tmp_path / "out")
