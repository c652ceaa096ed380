"""PLeaS of two models on disk: its limits, its cost, what transformers loads, what was refit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_llama
import small_problems
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.adapted import open_model, open_models
from evomerge.checkpoints.compare import other_depths
from evomerge.errors import MergeError
from evomerge.merging.export import export
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import Problem, fit
from evomerge.merging.fitted.calibration import Calibration
from evomerge.merging.merge import Merge
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.structure.permutations.linear_layers import Layer
from evomerge.merging.structure.pleas.fit import PleasFit, PleasSettings
from evomerge.merging.structure.pleas.model import Pair, PleasModel, Refitting

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "gpt2"]


def _models(family: str, root: Path) -> dict[str, str]:
    """Two models that have nothing in common, and a copy of the first."""
    found = {}
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        words = {"vocab_size": len(small_llama.TOKENS)}
        model = tiny_models.causal(family, seed=seed, dtype=torch.float32, **words)
        model.save_pretrained(root / name)
        small_llama.tokenizer().save_pretrained(root / name)
        found[name] = str(root / name)
    return found


def _problem(first: str, second: str, count: int = 12) -> Problem:
    models = {"a": open_model(first), "b": open_model(second)}
    data = {name: small_problems.examples(seed, count) for seed, name in enumerate(models)}
    digests = {model.path: model.scan().digest for model in models.values()}
    return Problem(None, models, digests, Calibration(data, dict.fromkeys(models, "random tokens")))


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = _models(request.param, tmp_path_factory.mktemp(request.param))
    settings = PleasSettings(similarity="weights")
    for second in "bc":
        artifact = Path(found["a"]).parent / f"with-{second}"
        fit(PleasFit(), _problem(found["a"], found[second]), settings, artifact)
        found[f"with-{second}"] = str(artifact)
    return found


def _pair(folders: dict[str, str], second: str = "b") -> Pair:
    models = open_model(folders["a"]), open_model(folders[second])
    return Pair(*models, open_artifact(folders[f"with-{second}"]))


def _recipe(folders: dict[str, str], second: str = "b", **parameters: Any) -> Recipe:
    sources = tuple(Source(n, ModelRef(folders[p])) for n, p in (("a", "a"), ("b", second)))
    artifact = ModelRef(folders[f"with-{second}"])
    return Recipe("pleas", None, sources, parameters, artifact=artifact)


def _merge(recipe: Recipe) -> Merge:
    return Merge(recipe, open_models(model.path for model in recipe.models))


def _live(path: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def _tokens() -> Tensor:
    return torch.randint(3, 48, (3, 12), generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=_tokens()).logits
    return found


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.4])
@pytest.mark.parametrize("least_squares", ["parallel", "none"])
def test_a_model_merged_with_itself_is_itself(folders, tmp_path, budget, least_squares):
    recipe = _recipe(folders, "c", budget=budget, least_squares=least_squares, allocation="uniform")
    export(recipe, tmp_path / "out")
    wanted, found = _logits(_live(folders["a"])), _logits(_live(tmp_path / "out"))
    assert (wanted - found).abs().max() < 1e-4 * wanted.abs().max()


def test_what_is_written_is_loaded_and_has_the_widths_that_were_asked_for(folders, tmp_path):
    recipe = _recipe(folders, budget=1.3)
    export(recipe, tmp_path / "out")
    model = _merge(recipe).anchor
    assert isinstance(model, PleasModel)
    assert any(model.apart.values())
    live = _live(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(folders["a"])
    assert sum(p.numel() for p in live.parameters()) > sum(p.numel() for p in plain.parameters())
    assert bool(_logits(live).isfinite().all())


def test_zeros_that_fill_up_a_layer_change_nothing(folders):
    """A layer where everything is apart makes room in all the others."""
    pair = _pair(folders)
    last = pair.widening.groups[-1]
    narrow = PleasModel(pair, {}, Refitting())
    wide = PleasModel(pair, {last.name: last.size}, Refitting())
    other = next(g for g in pair.widening.groups if g.role == last.role and g is not last)
    name = other.binds[0].params[0]
    assert wide.shape(name) != narrow.shape(name)
    assert torch.equal(_cut(wide.tensor(name), narrow.shape(name)), narrow.tensor(name))
    assert wide.tensor(name).count_nonzero() == narrow.tensor(name).count_nonzero()


def _cut(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        tensor = tensor.narrow(axis, 0, size)
    return tensor


def test_everything_apart_gives_the_mean_of_both_blocks(folders):
    """With the residual stream merged, an MLP whose neurons all stay apart computes the mean of the
    two MLPs of the same input."""
    pair = _pair(folders)
    group = next(g for g in pair.widening.groups if g.role == "mlp")
    model = PleasModel(pair, {group.name: group.size}, Refitting(form="none"))
    (down,) = (b for b in group.binds if pair.layers.get(b.params[0]) and _reads(pair, b))
    (_, axis), layer = (down.params[0], down.axis), pair.layers[down.params[0]]
    assert axis == layer.in_axis
    found = model.tensor(layer.weight).narrow(axis, 0, 2 * group.size)
    a, b = pair.of_a(layer.weight), pair.of_b(layer.weight)
    assert torch.equal(found, torch.cat([a, b], axis) / 2)


def _reads(pair: Pair, bind: Any) -> bool:
    return bool(bind.axis == pair.layers[bind.param].in_axis)


def test_least_squares_are_better_on_the_data_and_keep_the_zeros(folders):
    pair = _pair(folders)
    sizes = {g.name: g.size // 2 for g in pair.widening.groups}
    refit = PleasModel(pair, sizes, Refitting(ridge=1e-6))
    gained = 0
    for name, layer in pair.layers.items():
        equations, start = refit.equations(layer)
        values = _cut(refit.tensor(name), refit.merge.shape(name))
        found = values.double().movedim((layer.out_axis, layer.in_axis), (0, 1))
        if layer.bias is not None:
            bias = _cut(refit.tensor(layer.bias), refit.merge.shape(layer.bias))
            found = torch.cat([found, bias.double()[:, None]], 1)
        assert equations.error(found) <= equations.error(start) * (1 + 1e-6) + 1e-9, name
        gained += equations.error(found) < 0.9 * equations.error(start)
        allowed = refit.merge.allowed(name)
        if allowed is not None:
            assert not values[~allowed.expand(values.shape)].any(), name
    assert gained > len(pair.layers) / 2


def test_the_sums_give_what_stacked_rows_give(folders):
    """The solution against lstsq of the explicit rows of both live models."""
    pair = _pair(folders)
    sizes = {g.name: g.size // 2 for g in pair.widening.groups}
    model = PleasModel(pair, sizes, Refitting(ridge=0.0))
    layer = next(x for n, x in pair.layers.items() if model.merge.layout(n, x.in_axis) is None)
    rows = [_rows_of(folders, pair, which, layer) for which in "ab"]
    if len(rows[0][0]) <= rows[0][0].shape[1]:
        pytest.fail("the rows do not determine the layer")
    layout = model.merge.layout(layer.weight, layer.out_axis)
    y = (rows[0][1] + rows[1][1]) / 2
    if layout is not None:
        mine = [r[1].index_select(1, layout.origin) for r in rows]
        both = (mine[0] + mine[1]) / 2
        y = torch.where(layout.side == 1, mine[0], torch.where(layout.side == 2, mine[1], both))
    x = (rows[0][0] + rows[1][0]) / 2
    if layer.bias is not None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    wanted = torch.linalg.lstsq(x, y).solution
    equations, start = model.equations(layer)
    found = equations.solved(start).T
    assert torch.allclose(x @ found, x @ wanted, atol=2e-3 * float(y.abs().max()))


@torch.no_grad()
def _rows_of(
    folders: dict[str, str], pair: Pair, which: str, layer: Layer
) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a layer of one model on all data, float64."""
    model = AutoModelForCausalLM.from_pretrained(folders[which], dtype=torch.float32).eval()
    if which == "b":
        model.load_state_dict(_ordered(pair, model))
    module = model.get_submodule(layer.weight.removesuffix(".weight"))
    seen: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda m, x, y: seen.append((x[0], y)) or None)
    problem = _problem(folders["a"], folders["b"])
    for name in "ab":
        for example in problem.calibration.of(name):
            model(input_ids=torch.tensor([example.tokens]))
    x, y = (torch.cat([pair[k].flatten(0, -2) for pair in seen]).double() for k in (0, 1))
    return x, y


def _ordered(pair: Pair, model: Any) -> dict[str, Tensor]:
    known = model.state_dict()
    return {n: pair.of_b(n) if n in pair.shapes else t for n, t in known.items()}


def test_the_cost_is_what_the_built_model_multiplies(folders):
    """But for the zeros between the two models, which a plain layer multiplies as well."""
    pair = _pair(folders)
    for share in (0.0, 0.5, 1.0):
        apart = {g.name: round(share * g.size) for g in pair.widening.groups}
        model = PleasModel(pair, apart, Refitting(form="none"))
        layers = {n: s for n in pair.layers if (s := model.merge.shape(n))}
        counted = sum(s[0] * s[1] for s in layers.values())
        base = sum(pair.shapes[n][0] * pair.shapes[n][1] for n in layers)
        extra = pair.costs.dense(apart) - 1
        assert extra * _total(pair) == pytest.approx(
            counted - base + _attention(pair, apart), rel=1e-9
        )


def _total(pair: Pair) -> float:
    head = 0 if "lm_head.weight" in pair.layers else _embedding(pair)
    tokens = sum(pair.shapes[n][0] * pair.shapes[n][1] for n in pair.layers) + head
    sizes = {g.name: g.size for g in pair.widening.groups}
    return tokens + _attention(pair, sizes)


def _embedding(pair: Pair) -> int:
    name = next(n for n in pair.shapes if "embed_tokens" in n or n.endswith("wte.weight"))
    return pair.shapes[name][0] * pair.shapes[name][1]


def _attention(pair: Pair, apart: dict[str, int]) -> float:
    length = pair.fitted.facts["length"]
    kv = [g for g in pair.widening.groups if g.role == "kv"]
    each = {g.name: max(b.index.shape[1] for b in g.binds) for g in kv}
    return float(sum(each[g.name] * apart[g.name] * length for g in kv))


def test_equal_fingerprints_mean_equal_tensors(folders):
    """A bias that is refit with its layer changes with what the layer reads."""
    pair = _pair(folders)
    sizes = {g.name: g.size for g in pair.widening.groups}
    models = [PleasModel(pair, apart, Refitting()) for apart in _some_apart(sizes)]
    widened = {name for g in pair.widening.groups for bind in g.binds for name in bind.params}
    for name in pair.shapes:
        known: dict[Any, Tensor] = {}
        for model in models:
            tensor = model.tensor(name)
            assert torch.equal(known.setdefault(model.fingerprint(name), tensor), tensor), name
        assert len(known) > 1 or name not in widened


def _some_apart(sizes: dict[str, int]) -> list[dict[str, int]]:
    """Nothing apart, and half or all of one group, with room for all of every group."""
    each = [{name: size // 2} for name, size in sizes.items()]
    return [{}, *each, *({name: size} for name, size in sizes.items())]


def test_too_little_data_and_models_of_other_depths_are_refused(tmp_path):
    found = _models("llama", tmp_path)
    with pytest.raises(MergeError, match=r"reads \d+ inputs, and the data has 16 tokens"):
        fit(PleasFit(), _problem(found["a"], found["b"], 1), PleasSettings(), tmp_path / "few")
    deep = tiny_models.causal("llama", dtype=torch.float32, num_hidden_layers=3)
    deep.save_pretrained(tmp_path / "deep")
    models = {"b": open_model(str(tmp_path / "deep"))}
    (line,) = other_depths(open_model(found["a"]), models)
    assert line.startswith("source 'b': num_hidden_layers is 3, ")
    assert line.endswith(" has 2; it needs models of one depth")
