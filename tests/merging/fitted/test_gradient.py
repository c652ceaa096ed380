"""Gradients of shares against autograd through the model, and against differences of losses."""

from __future__ import annotations

import pytest
import small_problems
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.adapted import open_model
from evomerge.errors import MergeError
from evomerge.merging.fitted.adamerging import AdaMergingFit, AdaMergingSettings
from evomerge.merging.fitted.base import fit
from evomerge.merging.fitted.calibration import Calibration
from evomerge.merging.fitted.dam import DamFit, DamSettings
from evomerge.merging.fitted.gradient import MergeLoss
from evomerge.merging.merge import Merge
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.space import Space, load_space
from evomerge.space.layer_weights import LayerWeights

WEIGHTS = {"a": 0.3, "b": 0.6}
METHODS = {
    "task_arithmetic": {"normalize": False, "lambda": 0.8},
    "linear": {"normalize": False},
    "dare_linear": {"normalize": True, "lambda": 0.9, "density": 0.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_problems.models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def opened(folders):
    return {path: open_model(path) for path in folders.values()}


def data() -> Calibration:
    examples = {name: small_problems.examples(seed, 5) for seed, name in enumerate("ab")}
    return Calibration(examples, {})


def recipe(folders, method="task_arithmetic", weights=WEIGHTS, **parameters) -> Recipe:
    sources = tuple(Source(n, ModelRef(folders[n]), {"weight": w}) for n, w in weights.items())
    parameters = {**METHODS[method], **parameters}
    return Recipe(method, ModelRef(folders["base"]), sources, parameters, "float32", seed=3)


def loss_by_hand(model, weights, loss, teachers):
    """The mean over sources of the mean over examples, one example at a time."""
    total = 0.0
    for name, examples in data().examples.items():
        for example in examples:
            tokens = torch.tensor([example.tokens])
            logits = functional_call(model, weights, (tokens,)).logits[0, example.answer - 1 : -1]
            if loss == "answers":
                found = torch.nn.functional.cross_entropy(logits, tokens[0, example.answer :])
            else:
                theirs = teachers[name](tokens).logits[0, example.answer - 1 : -1].log_softmax(-1)
                gap = theirs - logits.log_softmax(-1)
                found = (theirs.exp() * gap).sum(-1).mean()
            total = total + found / (2 * len(examples))
    return total


@pytest.mark.parametrize("loss", ["answers", "sources"])
@pytest.mark.parametrize("method", METHODS)
def test_one_backward_pass_is_autograd_through_every_share(folders, opened, method, loss):
    wanted = recipe(folders, method)
    value, found = MergeLoss(wanted, opened, data(), loss=loss, batch_size=3).gradient(wanted)

    models = {n: AutoModelForCausalLM.from_pretrained(p) for n, p in folders.items()}
    states = {n: {k: v.detach() for k, v in m.named_parameters()} for n, m in models.items()}
    merge = Merge(wanted, opened)
    shares = {n: torch.zeros(len(states["a"]), requires_grad=True) for n in "ab"}
    # the merge of which the shares 0 add nothing, and their directions by a merge of each alone
    weights = {}
    for place, name in enumerate(states["a"]):
        origin = merge.tensor(name)
        for source in "ab":
            weights[name] = weights.get(name, origin) + shares[source][place] * direction(
                folders, opened, method, source, name, states
            )
    by_hand = loss_by_hand(models["base"], weights, loss, models)
    by_hand.backward()
    assert value == pytest.approx(by_hand.item(), rel=1e-5)
    for source in "ab":
        ours = torch.tensor([found[source][name] for name in states["a"]])
        scale = float(shares[source].grad.abs().max())
        torch.testing.assert_close(ours, shares[source].grad, rtol=1e-3, atol=1e-5 * scale)
        assert scale > 0


def direction(folders, opened, method, source, name, states):
    if method == "task_arithmetic":
        return states[source][name] - states["base"][name]
    if method == "linear":
        return states[source][name]
    only = {n: float(n == source) for n in "ab"}
    alone = Merge(recipe(folders, method, only, normalize=False, **{"lambda": 1.0}), opened)
    thinned = alone.tensor(name) - states["base"][name]
    kept = thinned != 0
    tau = states[source][name] - states["base"][name]
    assert torch.allclose(thinned[kept], 2 * tau[kept], atol=1e-6)  # 1/density
    return thinned


SPACES = {
    "task_arithmetic": {
        "method": "task_arithmetic",
        "source": {
            "weight": [
                {"name": "scale", "per": "source", "low": 0.0, "high": 1.0, "init": 0.3},
                {
                    "name": "curve",
                    "per": "type",
                    "types": ["attention", "mlp", "rest"],
                    "knots": 2,
                    "low": 0.1,
                    "high": 2.0,
                    "init": 1.0,
                    "scale": "log",
                },
            ]
        },
        "recipe": {"lambda": [{"low": 0.2, "high": 1.5, "init": 1.0}]},
    },
    "linear": {
        "method": "linear",
        "source": {
            "weight": [{"per": "source", "blocks": 2, "low": 0.1, "high": 1.0, "init": 0.4}]
        },
        "recipe": {"normalize": True},
    },
}


@pytest.mark.parametrize("name", SPACES)
def test_chained_to_genes_it_is_the_slope_of_the_loss(folders, opened, name):
    space: Space = load_space(SPACES[name])
    tensors = opened[folders["base"]].names
    weights = LayerWeights(space, ["a", "b"], tensors)
    count = len(space.genes(["a", "b"]))
    genome = tuple(torch.linspace(0.2, 0.8, count).tolist())

    def decoded(genome):
        models = {n: ModelRef(folders[n]) for n in "ab"}
        base = ModelRef(folders["base"])
        return space.decode(genome, base=base, sources=models, dtype="float32", seed=0)

    descent = MergeLoss(decoded(genome), opened, data())
    _, gradients = descent.gradient(decoded(genome))
    chained = weights.chain(genome, gradients)
    generator = torch.Generator().manual_seed(0)
    for way in torch.randn(3, count, generator=generator).tolist():
        up, down = (
            tuple(u + step * w for u, w in zip(genome, way, strict=True)) for step in (2e-3, -2e-3)
        )
        slope = (descent.value(decoded(up)) - descent.value(decoded(down))) / 4e-3
        assert float(chained @ way) == pytest.approx(slope, rel=0.02, abs=1e-4)
    assert abs(chained).max() > 1e-3


@pytest.mark.parametrize("method", ["dam", "adamerging"])
def test_what_a_fit_has_learned_is_scaled_downhill(folders, opened, method, tmp_path):
    fits = {
        "dam": (DamFit(), DamSettings(steps=2, anchor="base", learning_rate=0.1)),
        "adamerging": (AdaMergingFit(), AdaMergingSettings(steps=2, lr=0.1)),
    }
    fit(fits[method][0], small_problems.problem(folders), fits[method][1], tmp_path / "fitted")

    def scaled(a, b):
        sources = (Source(n, ModelRef(folders[n]), {"scale": s}) for n, s in (("a", a), ("b", b)))
        artifact = ModelRef(str(tmp_path / "fitted"))
        return Recipe(method, ModelRef(folders["base"]), tuple(sources), artifact=artifact)

    loss = MergeLoss(scaled(1, 1), opened, data())
    _, found = loss.gradient(scaled(0.7, 1.2))
    step = 0.02
    for source, (a, b) in {"a": (step, 0), "b": (0, step)}.items():
        up, down = loss.value(scaled(0.7 + a, 1.2 + b)), loss.value(scaled(0.7 - a, 1.2 - b))
        slope = (up - down) / (2 * step)
        assert sum(found[source].values()) == pytest.approx(slope, rel=0.02, abs=1e-5)
        assert abs(slope) > 1e-4


def test_what_is_not_linear_is_refused(folders, opened):
    sources = tuple(Source(n, ModelRef(folders[n])) for n in "ab")
    ties = Recipe("ties", ModelRef(folders["base"]), sources)
    with pytest.raises(MergeError, match=r"ties is not linear .* task_arithmetic"):
        MergeLoss(ties, opened, data())
