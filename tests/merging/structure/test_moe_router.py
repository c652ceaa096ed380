"""Routers trained after a merge: what is learned, what is left, and attempts that were cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_experts
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.errors import MergeError
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.grouping import Groups
from evomerge.merging.structure.experts.layers import expert_layers
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import LayerPlan
from evomerge.merging.structure.experts.remapped import load_remapped
from evomerge.merging.structure.experts.router_distillation import distilled_routers
from evomerge.merging.structure.experts.settings import ExpertSettings

DISTILLED: dict[str, Any] = {
    "keep": 2, "router": "distilled", "router_steps": 24, "router_learning_rate": 0.02,
    "allocation": "uniform", "batch_size": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder("mixtral", tmp_path_factory.mktemp("mixtral"))


def _problem(folder: Path, examples: list[Example] | None = None, **settings: Any) -> ExpertProblem:
    data = small_experts.examples() if examples is None else examples
    return ExpertProblem(Checkpoint.open(str(folder)), data, ExpertSettings(**settings))


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def _divergence(folder: Path, student: Path) -> float:
    """Mean KL of the whole model to the student on the calibration data, in float64."""
    examples = small_experts.examples()
    whole, found = (
        small_experts.logits(small_experts.loaded(place), examples) for place in (folder, student)
    )
    total = torch.zeros((), dtype=torch.float64)
    for y, z in zip(whole, found, strict=True):
        wanted, made = y[:-1].double().log_softmax(1), z[:-1].double().log_softmax(1)
        total += (wanted.exp() * (wanted - made)).sum()
    return float(total / sum(len(y) - 1 for y in whole))


@pytest.mark.parametrize("form", ["replicated", "remapped", "collapsed"])
def test_distilled_routers_alone_differ_and_follow_the_whole_model(
    mixtral: Path, tmp_path: Path, form: str
) -> None:
    start = "logsumexp" if form == "collapsed" else "dominant"
    merge_experts(_problem(mixtral, **{**DISTILLED, "form": form}), tmp_path / "out")
    merge_experts(_problem(mixtral, **{**DISTILLED, "form": form, "router": start}),
                  tmp_path / "start")  # fmt: skip
    before, after = _weights(tmp_path / "start"), _weights(tmp_path / "out")
    routers = {layer.router[0] for layer in expert_layers(Checkpoint.open(str(mixtral)))}
    assert {n for n, tensor in before.items() if not torch.equal(after[n], tensor)} == routers
    if form == "collapsed":
        closer, further = (_divergence(mixtral, tmp_path / n) for n in ("out", "start"))
        assert closer < 0.9 * further
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (tmp_path / "start").iterdir()
    }


def test_the_remapped_form_has_the_routers_of_the_replicated(mixtral: Path, tmp_path: Path) -> None:
    for form in ("replicated", "remapped"):
        merge_experts(_problem(mixtral, **{**DISTILLED, "form": form}), tmp_path / form)
    big, small = small_experts.loaded(tmp_path / "replicated"), load_remapped(tmp_path / "remapped")
    pair = (small_experts.logits(model, small_experts.examples()) for model in (big, small))
    for one, two in zip(*pair, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_routers_that_were_disturbed_are_found_again(mixtral: Path) -> None:
    """No expert merged: whatever the student says otherwise is its routers' fault."""
    model = Checkpoint.open(str(mixtral))
    layers = expert_layers(model)
    generator = torch.Generator().manual_seed(0)
    noisy = []
    for layer in layers:
        router = model.tensor(layer.router[0])
        noise = torch.randn(router.shape, generator=generator)
        noisy.append(router + 0.3 * router.std() * noise)
    plans = [LayerPlan(Groups((0, 1, 2, 3)), (1.0, 1.0, 1.0, 1.0))] * len(layers)
    student = MergedExperts(model, layers, plans, ExpertSettings(keep=4), routers=noisy)
    curve: list[float] = []

    class Curve:
        state = None

        def save(self, tensors: Any, notes: Any, *, flops: float) -> None:
            curve[:] = notes["curve"]["kl"]

    distilled_routers(
        model, student, layers, small_experts.examples(), Curve(),
        steps=200, learning_rate=0.02, batch_size=10,
    )  # fmt: skip
    assert curve[-1] < 0.5 * curve[0]


def test_a_router_with_nothing_to_learn_stays_as_it_is(mixtral: Path, tmp_path: Path) -> None:
    """All experts kept: the student is the teacher, and its gradient exactly 0."""
    merge_experts(_problem(mixtral, **{**DISTILLED, "keep": 4}), tmp_path / "out")
    after = _weights(tmp_path / "out")
    for name, tensor in _weights(mixtral).items():
        assert torch.equal(after[name], tensor), name


def test_training_that_was_cut_off_goes_on_to_the_same_bytes(mixtral: Path, tmp_path: Path) -> None:
    problem = _problem(mixtral, **{**DISTILLED, "form": "collapsed"})
    merge_experts(problem, tmp_path / "whole")
    steps: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "training routers":
            steps.append(done)
            if done == 22 and len(steps) == 22:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_experts(problem, tmp_path / "out", progress=interrupt)
    merge_experts(problem, tmp_path / "out", progress=interrupt)
    assert steps == [*range(1, 23), 21, 22, 23, 24]  # from the state of step 20
    for name in ("model.safetensors", "evomerge_experts.json"):
        whole, resumed = (tmp_path / place / name for place in ("whole", "out"))
        assert whole.read_bytes() == resumed.read_bytes()


def test_a_switch_distils_its_routers(tmp_path: Path) -> None:
    """Top-1 gates: the row of the expert that is chosen learns by its probability."""
    place = small_experts.folder(small_experts.SWITCH, tmp_path / "model")
    merge_experts(_problem(place, **{**DISTILLED, "form": "collapsed"}), tmp_path / "out")
    merge_experts(_problem(place, **{**DISTILLED, "form": "collapsed", "router": "logsumexp"}),
                  tmp_path / "start")  # fmt: skip
    assert _divergence(place, tmp_path / "out") < _divergence(place, tmp_path / "start")


def test_data_without_a_token_to_predict_is_refused(mixtral: Path, tmp_path: Path) -> None:
    lone = [Example((token,)) for token in range(3, 20)]
    with pytest.raises(MergeError, match="no example has a token to predict"):
        merge_experts(_problem(mixtral, lone, **DISTILLED), tmp_path / "out")


@pytest.mark.parametrize("router", ["mean", "logsumexp"])
@pytest.mark.parametrize("form", ["replicated", "remapped"])
def test_routers_are_collapsed_in_the_collapsed_form_only(router, form):
    with pytest.raises(ValidationError, match=f"router: {router}: is for the collapsed form"):
        ExpertSettings(keep=2, form=form, router=router)
    assert ExpertSettings(keep=2, form="collapsed", router=router).router == router
