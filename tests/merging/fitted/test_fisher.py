"""Fisher merging against per-example gradients of transformers' models, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_families
import tiny_models
import torch
from small_families import FAMILIES
from torch import Tensor
from torch.func import functional_call, grad

from evomerge.errors import MergeError, UserError
from evomerge.merging.fitted import fisher as fisher_fit
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import Problem, fit
from evomerge.merging.fitted.calibration import Example, batch
from evomerge.merging.fitted.fisher import FisherFit, FisherSettings, drawn
from evomerge.merging.fitted.network import Network
from evomerge.merging.merge import open_merge
from evomerge.merging.methods.fisher import Fisher, fisher_key
from evomerge.merging.methods.masks import mask_key
from evomerge.testing.fitted_cases import Learned
from evomerge.testing.merge_laws import TENSOR, Case, merged

DATA = FisherSettings(labels="data")


def _oracle(found: Problem, source: str) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of the answer's log-likelihood, float64."""
    model = small_families.live(found, source, torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def likelihood(parameters: dict[str, Tensor], example: Example) -> Tensor:
        tokens = torch.tensor([example.tokens])
        out = functional_call(model, parameters, args=(), kwargs={"input_ids": tokens})
        logs = out.logits.double().log_softmax(-1)[0]
        at = torch.arange(example.answer, len(example.tokens))
        return logs[at - 1, tokens[0, at]].sum()

    examples = found.calibration.of(source)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example in examples:
        for name, g in grad(likelihood)(parameters, example).items():
            total[name] += g.square() / len(examples)
    return total


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen2"])
def test_it_is_the_mean_squared_gradient_of_single_examples(family, tmp_path):
    found = small_families.problem(family, tmp_path, count=6)
    fit(FisherFit(), found, DATA, tmp_path / "fisher")
    artifact = open_artifact(tmp_path / "fisher")
    for source in found.sources:
        oracle = _oracle(found, source)
        assert len(artifact.names) == 2 * len(oracle)
        for name, wanted in oracle.items():
            information = artifact.tensor(fisher_key(source, name)).double()
            error = (information - wanted).abs().max() / wanted.max()
            assert float(error) < 1e-4, name
        every = torch.cat([values.flatten() for values in oracle.values()])
        assert artifact.facts["norms"][source] == pytest.approx(float(every.norm()), rel=1e-4)
        assert artifact.facts["means"][source] == pytest.approx(float(every.mean()), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalize", [False, True])
def test_it_merges_by_the_papers_formula(family, normalize, tmp_path):
    found = small_families.problem(family, tmp_path, count=3)
    fit(FisherFit(), found, DATA, tmp_path / "fisher")
    artifact = open_artifact(tmp_path / "fisher")
    given = {"floor": 0.01, "normalize": normalize}
    recipe = small_families.recipe(found, "fisher", tmp_path / "fisher", **given)
    one, two = recipe.sources
    recipe = replace(recipe, sources=(replace(one, parameters={"weight": 3.0}), two))
    merge = open_merge(recipe)
    for name in merge.names:
        upper, lower = 0.0, 0.0
        for weight, (source, model) in zip((3.0, 1.0), found.sources.items(), strict=True):
            information = artifact.tensor(fisher_key(source, name)).double()
            information = information.clamp_min(0.01 * artifact.facts["means"][source])
            scale = weight / (artifact.facts["norms"][source] if normalize else 1.0)
            upper = upper + scale * information * model.tensor(name).double()
            lower = lower + scale * information
        torch.testing.assert_close(merge.tensor(name).double(), upper / lower, rtol=2e-7, atol=0)


def test_drawn_labels_have_the_expectation_over_all_labels(tmp_path):
    """E_y (∂ log p(y))² of one token's distribution, worked out over all 48 labels."""
    found = small_families.problem("llama", tmp_path)
    network = Network(found.sources["a"])
    example = Example((5, 6, 7), 2)
    name = "model.layers.1.mlp.down_proj.weight"
    taken: list[Tensor] = []

    def take(key: str, gradient: Tensor) -> None:
        if key == name:
            taken.append(gradient.double().square())

    expected = torch.zeros(network.shape(name), dtype=torch.float64)
    with network.gradients(take):
        one = batch([example])
        for label in range(48):
            logs = network.logits(one)[one.counted].log_softmax(-1)[0]
            network.backward(logs[label], one, what="test")
            expected += float(logs[label].detach().exp()) * taken.pop()
        for key in range(225):
            fisher_fit._differentiate(network, example, mask_key(0, "a", str(key)), "model")
    sample = torch.stack(taken)
    deviation = (sample.mean(0) - expected).abs() / (sample.std(0) / 15 + 1e-12)
    assert float(deviation.mean()) < 1.2  # 0.8 for a normal distribution
    total = sample.flatten(1).sum(1)
    assert abs(float(total.mean() - expected.sum())) < 4 * float(total.std()) / 15


def test_labels_are_drawn_with_their_probability():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20_000, 4)
    found = drawn(logits, mask_key(3, "a", "x"))
    share = torch.bincount(found, minlength=4) / len(found)
    assert float((share - logits[0].softmax(-1)).abs().max()) < 0.02
    assert torch.equal(found[:7], drawn(logits[:7], mask_key(3, "a", "x")))
    assert not torch.equal(found, drawn(logits, mask_key(4, "a", "x")))


def test_the_draw_depends_on_the_example_not_on_its_place(tmp_path):
    found = small_families.problem("llama", tmp_path, count=5)
    turned = {n: tuple(reversed(e)) for n, e in found.calibration.examples.items()}
    other = replace(found, calibration=replace(found.calibration, examples=turned))
    for number, each in enumerate((found, other)):
        fit(FisherFit(), each, FisherSettings(), tmp_path / str(number))
    one, two = (open_artifact(tmp_path / str(number)) for number in range(2))
    for name in one.names:
        torch.testing.assert_close(one.tensor(name), two.tensor(name), rtol=1e-5, atol=1e-12)


def test_bfloat16_is_the_same_rounded(tmp_path):
    found = small_families.problem("llama", tmp_path, count=2)
    fit(FisherFit(), found, DATA, tmp_path / "whole")
    short = FisherSettings(labels="data", dtype="bfloat16")
    fit(FisherFit(), found, short, tmp_path / "short")
    whole, half = open_artifact(tmp_path / "whole"), open_artifact(tmp_path / "short")
    for name in whole.names:
        assert torch.equal(half.tensor(name), whole.tensor(name).bfloat16())


def test_recomputed_activations_change_nothing(tmp_path):
    found = small_families.problem("llama", tmp_path, count=2)
    for name, again in (("kept", False), ("again", True)):
        settings = FisherSettings(labels="data", checkpointing=again)
        fit(FisherFit(), found, settings, tmp_path / name)
    one, two = open_artifact(tmp_path / "kept"), open_artifact(tmp_path / "again")
    for name in one.names:
        torch.testing.assert_close(one.tensor(name), two.tensor(name))


def test_interrupted_it_goes_on_to_the_same(tmp_path, monkeypatch):
    found = small_families.problem("llama", tmp_path, count=7)
    monkeypatch.setattr(fisher_fit, "SAVED_EVERY", 2)
    fit(FisherFit(), found, FisherSettings(), tmp_path / "whole")
    counted, differentiate = [], fisher_fit._differentiate

    def interrupted(*arguments):
        counted.append(arguments)
        if len(counted) in (6, 15):  # the sixth of either source, with four saved
            raise KeyboardInterrupt
        differentiate(*arguments)

    monkeypatch.setattr(fisher_fit, "_differentiate", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(FisherFit(), found, FisherSettings(), tmp_path / "fisher")
    fit(FisherFit(), found, FisherSettings(), tmp_path / "fisher")
    assert open_artifact(tmp_path / "whole").digest == open_artifact(tmp_path / "fisher").digest
    assert (
        len(counted) == 14 + 2 + 2
    )  # once each, the two that were cut off, and the two done before them


def _case(fishers, sources, **parameters):
    tensors = {fisher_key(n, TENSOR): torch.tensor(f) for n, f in fishers.items()}
    means = {n: float(torch.tensor(f).mean()) for n, f in fishers.items()}
    norms = {n: float(torch.tensor(f).norm()) or 1.0 for n, f in fishers.items()}
    found = Learned({"means": means, "norms": norms}, tensors)
    rows = {n: torch.tensor(s) for n, s in sources.items()}
    size = len(next(iter(rows.values())))
    return Case(torch.zeros(size), rows, parameters, fitted=found)


def test_by_hand():
    case = _case({"a": [3.0, 1.0], "b": [1.0, 0.0]}, {"a": [4.0, 5.0], "b": [8.0, 9.0]})
    plain = merged(Fisher(), case.given(normalize=False, floor=0.0))
    assert plain.tolist() == [5.0, 5.0]  # (3·4 + 1·8)/4, and b knows nothing
    floored = merged(Fisher(), case.given(normalize=False, floor=2.0))
    assert floored.tolist() == pytest.approx([(4 * 4 + 8) / 5, (4 * 5 + 9) / 5])  # φ = 4, 1
    normal = merged(Fisher(), case.given(normalize=True, floor=0.0))
    root = 10**0.5
    assert normal.tolist() == pytest.approx([(3 / root * 4 + 8) / (3 / root + 1), 5.0])


def test_equal_information_is_an_average_and_none_is_too():
    sources = {"a": [4.0, -1.0], "b": [8.0, 2.0], "c": [0.0, 5.0]}
    for values in ([0.3, 7e-12], [0.0, 0.0]):
        case = _case(dict.fromkeys("abc", values), sources, floor=0.0)
        assert merged(Fisher(), case).tolist() == pytest.approx([4.0, 2.0])
    weighted = replace(case, own={"a": {"weight": 2.0}})
    assert merged(Fisher(), weighted).tolist() == pytest.approx([4.0, 1.25])


def test_a_common_factor_cancels_and_with_normalize_each_ones():
    fishers = {"a": [3.0, 0.0, 1e-9], "b": [1.0, 2.0, 0.5]}
    sources = {"a": [4.0, 5.0, 6.0], "b": [8.0, 9.0, 1.0]}
    both = {n: [x * 1e-6 for x in f] for n, f in fishers.items()}
    one = {"a": fishers["a"], "b": both["b"]}
    for scaled, normalize, same in ((both, False, True), (one, True, True), (one, False, False)):
        given = {"normalize": normalize, "floor": 0.01}
        results = [merged(Fisher(), _case(f, sources, **given)) for f in (fishers, scaled)]
        assert torch.allclose(*results, rtol=1e-6) == same


def test_weights_that_decide_nothing_are_one_line(tmp_path):
    folders = small_families.folders("llama", tmp_path)
    model = tiny_models.causal("llama", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.save_pretrained(folders["b"])
    found = small_families.opened(folders)
    with pytest.raises(MergeError, match="b: every gradient is 0"):
        fit(FisherFit(), found, DATA, tmp_path / "fisher")
    assert not (tmp_path / "fisher").exists()


def test_without_data_it_is_refused(tmp_path):
    found = small_families.problem("llama", tmp_path, count=0)
    with pytest.raises(UserError, match="source 'a': 0 examples"):
        fit(FisherFit(), found, DATA, tmp_path / "fisher")


def test_another_vocabulary_is_one_line():
    case = _case({"a": [3.0, 1.0], "b": [1.0, 0.0]}, {"a": [4.0], "b": [8.0]})
    with pytest.raises(MergeError, match="the vocabulary of the merge"):
        merged(Fisher(), case)
