"""The fit of PLeaS: it goes on where it was cut off, and refits one merge layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_llama
import tiny_models
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.adapted import open_model, open_models
from evomerge.errors import MergeError
from evomerge.merging.export import export
from evomerge.merging.fitted.artifact import Artifact, Draft, open_artifact
from evomerge.merging.fitted.base import Problem, fit
from evomerge.merging.fitted.calibration import Calibration, Example
from evomerge.merging.merge import Merge
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.structure.pleas.fit import PleasFit, PleasSettings
from evomerge.merging.structure.pleas.model import Pair, PleasModel

SEQUENTIAL = {"budget": 1.3, "allocation": "uniform", "ridge": 1e-4}


def _problem(root: Path, family: str = "llama") -> Problem:
    models = {}
    for seed, name in enumerate("ab"):
        words = {"vocab_size": len(small_llama.TOKENS)}
        model = tiny_models.causal(family, seed=seed, dtype=torch.float32, **words)
        model.save_pretrained(root / name)
        small_llama.tokenizer().save_pretrained(root / name)
        models[name] = open_model(str(root / name))
    data = {name: _examples(seed) for seed, name in enumerate(models)}
    digests = {model.path: model.scan().digest for model in models.values()}
    return Problem(None, models, digests, Calibration(data, dict.fromkeys(models, "random")))


def _examples(seed: int) -> tuple[Example, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, len(small_llama.TOKENS), (24, 8), generator=generator)
    return tuple(Example(tuple(row)) for row in rows.tolist())


def _recipe(problem: Problem, artifact: Path, **parameters: Any) -> Recipe:
    sources = tuple(Source(n, ModelRef(model.path)) for n, model in problem.sources.items())
    known = {"budget": 1.3, "allocation": "uniform", "least_squares": "sequential", **parameters}
    return Recipe("pleas", None, sources, known, artifact=ModelRef(str(artifact)))


def _built(recipe: Recipe) -> PleasModel:
    found = Merge(recipe, open_models(model.path for model in recipe.models)).anchor
    assert isinstance(found, PleasModel)
    return found


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen2", "gpt2"])
def fitted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Problem, Path]:
    root = tmp_path_factory.mktemp(request.param)
    problem = _problem(root, request.param)
    fit(
        PleasFit(),
        problem,
        PleasSettings(batch_size=32, similarity="distance", sequential=SEQUENTIAL),
        root / "artifact",
    )
    return problem, root / "artifact"


def _calls(monkeypatch: pytest.MonkeyPatch, what: str) -> Callable[[int], None]:
    """Interrupts the fit at a call of one of a draft's methods."""
    method = getattr(Draft, what)

    def interrupt(at: int) -> None:
        count = 0

        def counted(draft: Draft, *arguments: Any, **options: Any) -> None:
            nonlocal count
            method(draft, *arguments, **options)
            count += 1
            if count == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(Draft, what, counted)

    return interrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, str]:
    """A fit that was not interrupted: its problem and its digest."""
    root = tmp_path_factory.mktemp("whole")
    problem = _problem(root)
    fit(
        PleasFit(),
        problem,
        PleasSettings(batch_size=32, similarity="distance", sequential=SEQUENTIAL),
        root / "artifact",
    )
    return problem, open_artifact(root / "artifact").digest


@pytest.mark.parametrize(
    ("what", "at"), [("keep", 1), ("keep", 2), ("save", 7), ("keep", 3), ("keep", 4)]
)
def test_interrupted_at_any_stage_it_goes_on_to_the_same(whole, tmp_path, monkeypatch, what, at):
    (problem, digest), settings = (
        whole,
        PleasSettings(batch_size=32, similarity="distance", sequential=SEQUENTIAL),
    )
    with monkeypatch.context() as patched:
        _calls(patched, what)(at)
        with pytest.raises(KeyboardInterrupt):
            fit(PleasFit(), problem, settings, tmp_path / "out")
    again: list[str] = []
    with monkeypatch.context() as patched:
        for name in ("keep", "save"):
            _listed(patched, name, again)
        fit(PleasFit(), problem, settings, tmp_path / "out")
    assert open_artifact(tmp_path / "out").digest == digest
    stages = ["keep", "keep", *["save"] * 10, "keep", "keep"]  # 4 groups: 10 merges are scored
    done = [k for k, stage in enumerate(stages) if stage == what][at - 1] + 1
    assert again == stages[done:]


def _listed(patched: pytest.MonkeyPatch, name: str, calls: list[str]) -> None:
    method = getattr(Draft, name)

    def listed(draft: Draft, *arguments: Any, **options: Any) -> None:
        calls.append(name)
        method(draft, *arguments, **options)

    patched.setattr(Draft, name, listed)


def test_interrupted_between_layers_it_refits_them_again(tmp_path, monkeypatch):
    problem, settings = (
        _problem(tmp_path),
        PleasSettings(batch_size=32, similarity="distance", sequential=SEQUENTIAL, worth=False),
    )
    fit(PleasFit(), problem, settings, tmp_path / "whole")
    solved = _interrupted_solving(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        fit(PleasFit(), problem, settings, tmp_path / "out")
    fit(PleasFit(), problem, settings, tmp_path / "out")
    assert open_artifact(tmp_path / "out").digest == open_artifact(tmp_path / "whole").digest
    assert len(solved) == 5 + 15


def _interrupted_solving(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    from evomerge.merging.structure.refit.normal_equations import Equations

    solve, solved = Equations.solved, list[int]()

    def counted(equations: Equations, start: Tensor) -> Tensor:
        solved.append(1)
        if len(solved) == at:
            raise KeyboardInterrupt
        return solve(equations, start)

    monkeypatch.setattr(Equations, "solved", counted)
    return solved


def test_the_cost_of_a_fit_is_that_of_all_its_stages(fitted):
    """Forward passes of both models for matching and for the inputs alone are more than worth."""
    _, folder = fitted
    artifact = open_artifact(folder)
    notes = artifact.cost["flops"]
    tokens = 48 * 8
    assert notes > 2 * tokens * 2 * 2 * _least_size(artifact)


def _least_size(artifact: Artifact) -> int:
    return sum(
        artifact.tensor(name).numel() for name in artifact.names if name.startswith("sequential/")
    )


def test_every_layer_fits_what_it_is_given_in_the_refit_model(fitted, tmp_path):
    """The exported model's own inputs of a layer, and what the two models gave, by lstsq."""
    problem, folder = fitted
    recipe = _recipe(problem, folder)
    model = _built(recipe)
    export(recipe, tmp_path / "out")
    pair = Pair(*problem.sources.values(), open_artifact(folder))
    name = _last_of_one_layout(pair, model)
    x = _seen(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), problem, name)[0]
    given = [_seen(_live(pair, which), problem, name)[1] for which in "ab"]
    y = _laid_out(model, pair.layers[name], *given)
    layer = pair.layers[name]
    x = x[:, : model.merge.shape(name)[layer.in_axis]]
    weight = model.unfilled(name).double().movedim((layer.out_axis, layer.in_axis), (0, 1))
    if layer.bias is not None:
        x = torch.cat([x, x[:, :1] ** 0], 1)
        weight = torch.cat([weight, model.unfilled(layer.bias).double()[:, None]], 1)
    damped = x.square().mean(0)[: weight.shape[1] - (layer.bias is not None)].mean() * 1e-4
    gradient = 2 * (x @ weight.T - y).T @ x / len(x)
    assert gradient.abs().max() < 20 * damped * weight.abs().max()


def _last_of_one_layout(pair: Pair, model: PleasModel) -> str:
    """A layer behind refit ones, none of whose entries must be zero: the last down-projection."""
    names = [n for n in pair.layers if "down_proj" in n or "mlp.c_proj" in n]
    assert model.merge.layout(names[-1], pair.layers[names[-1]].in_axis) is not None
    return names[-1]


def _live(pair: Pair, which: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained((pair.a if which == "a" else pair.b).folder)
    if which == "b":
        known = model.state_dict()
        model.load_state_dict({n: _ordered(pair, n, t) for n, t in known.items()})
    return model


def _ordered(pair: Pair, live: str, tensor: Tensor) -> Tensor:
    stored = next((n for n in (live, live.removeprefix("transformer.")) if n in pair.shapes), None)
    return tensor if stored is None else pair.of_b(stored)


@torch.no_grad()
def _seen(model: Any, problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """What a layer is given and gives on all data, float64."""
    paths = dict(model.named_modules())
    path = name.removesuffix(".weight")
    module = paths.get(path) or paths[f"transformer.{path}"]
    seen: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    examples = [e for source in problem.sources for e in problem.calibration.of(source)]
    for example in examples:
        model.eval()(input_ids=torch.tensor([example.tokens]))
    x, y = (torch.cat([rows[k].flatten(0, -2) for rows in seen]).double() for k in (0, 1))
    return x, y


def _laid_out(model: PleasModel, layer: Any, a: Tensor, b: Tensor) -> Tensor:
    layout = model.merge.layout(layer.weight, layer.out_axis)
    if layout is None:
        return (a + b) / 2
    a, b = a[:, layout.origin], b[:, layout.origin]
    return torch.where(layout.side == 1, a, torch.where(layout.side == 2, b, (a + b) / 2))


def test_a_blend_lies_between_the_partial_merge_and_the_refit_one(fitted):
    problem, folder = fitted
    for form in ("parallel", "sequential"):
        model, half, none = (
            _built(_recipe(problem, folder, least_squares=f, blend=blend))
            for f, blend in ((form, 1.0), (form, 0.25), ("none", 1.0))
        )
        for name in model.names:
            wanted = none.tensor(name).lerp(model.tensor(name), 0.25)
            assert torch.allclose(half.tensor(name), wanted, atol=1e-6), name


def test_what_was_not_fitted_is_refused_in_one_line(fitted, tmp_path):
    problem, folder = fitted
    with pytest.raises(MergeError, match=r"fitted for a budget of 1\.3 by allocation uniform"):
        _built(_recipe(problem, folder, budget=1.1))
    weighed = _recipe(problem, folder)
    sources = tuple(
        Source(s.name, s.model, {"weight": w}) for s, w in zip(weighed.sources, (1, 3), strict=True)
    )
    recipe = Recipe("pleas", None, sources, weighed.parameters, artifact=weighed.artifact)
    with pytest.raises(MergeError, match="equal weight"):
        _built(recipe)


def test_a_fit_without_it_has_no_sequential_form(tmp_path):
    problem = _problem(tmp_path)
    settings = PleasSettings(batch_size=32, worth=False, grams=False, similarity="weights")
    fit(PleasFit(), problem, settings, tmp_path / "artifact")
    for parameters, words in (
        ({}, r"fitted without `sequential`"),
        ({"least_squares": "parallel"}, r"grams: false"),
        ({"least_squares": "none", "allocation": "programme"}, r"without `worth`"),
        ({"least_squares": "none", "budget": 1.9}, r"must lie between 1 and 1\.\d+"),
    ):
        with pytest.raises(MergeError, match=words):
            _built(_recipe(problem, tmp_path / "artifact", **parameters))


def test_a_programme_without_worth_is_refused_before_any_model_is_run():
    with pytest.raises(ValidationError, match="needs `worth`"):
        PleasSettings(worth=False, sequential={})
