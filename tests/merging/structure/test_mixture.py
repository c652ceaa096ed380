"""Dense models as experts of a mixture: functions, tensors, interrupted and resumed, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_adapters
import small_llama
import tiny_models
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.adapted import open_model
from evomerge.errors import ExportError, MergeError, NonFiniteTensor, SpecError
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.mixture import export as mixture_export
from evomerge.merging.structure.mixture.export import MIXTURE_FILE, MixtureProblem, make_mixture
from evomerge.merging.structure.mixture.gates import Prompts
from evomerge.merging.structure.mixture.recipe import MixtureExpert, MixtureRecipe

Dense = Callable[..., Path]

WINDOW = {"sliding_window": 4, "use_sliding_window": True}
# family of the dense model, its options, what it becomes: None is the default of its family
BECOMES = [
    ("llama", {}, None),
    ("llama", {"tie_word_embeddings": True, "head_dim": 6}, None),
    ("llama", {}, "qwen2_moe"),
    ("llama", {}, "deepseek"),
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"sliding_window": 4}, None),
    ("mistral", {"sliding_window": 4}, "qwen2_moe"),
    ("qwen2", {}, None),
    ("qwen2", {**WINDOW, "max_window_layers": 1}, None),
    ("qwen3", {}, None),
    ("qwen3", {"attention_bias": True}, None),
    ("qwen3", {**WINDOW, "max_window_layers": 0}, None),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Tiny dense models by family and seed, with weights of a size that keeps answers tame."""
    place = tmp_path_factory.mktemp("dense")

    def make(family: str = "llama", seed: int = 0, **options: Any) -> Path:
        folder = place / f"{family}-{seed}-{len(list(place.iterdir()))}"
        name, own = tiny_models.CAUSAL[family]
        config = getattr(transformers, f"{name}Config")(**{**tiny_models._SMALL, **own, **options})
        model = AutoModelForCausalLM.from_config(config)
        tiny_models.randomised(model, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.3)
        model.save_pretrained(folder)
        small_llama.tokenizer(small_llama.TOKENS[:48]).save_pretrained(folder)
        return folder

    return make


def _problem(
    base: Path, experts: list[Path], prompts: list[Prompts] | None = None, **options: Any
) -> MixtureProblem:
    each = options.pop("each", {})
    shared = options.pop("shared", None)
    named = [
        MixtureExpert(model=str(path), positive_prompts=(str(number),), **each)
        for number, path in enumerate(experts)
    ]
    recipe = MixtureRecipe(
        base_model=str(base),
        experts=tuple(named),
        shared_experts=() if shared is None else (shared,),
        **{"gate": "random", **options},
    )
    count = len(experts) + (recipe.gated_shared is not None)
    return MixtureProblem(
        recipe,
        Checkpoint.open(str(base)),
        [open_model(str(path)) for path in experts],
        open_model(shared.model) if shared else None,
        prompts or [Prompts(())] * count,
    )


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    eager = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **eager
    )
    assert not any(info.values()), info
    return model.eval()


def _weights(folder: Path) -> dict[str, Tensor]:
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 48, (3, 12), generator=torch.Generator().manual_seed(0))
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize(("family", "options", "becomes"), BECOMES)
@pytest.mark.parametrize("gate", ["random", "hidden"])
def test_copies_of_a_dense_model_compute_what_it_does_whatever_the_router(
    dense: Dense, tmp_path: Path, family: str, options: Any, becomes: str | None, gate: str
) -> None:
    path = dense(family, **options)
    prompts = [Prompts(((1, 5 + e, 9),)) for e in range(3)]
    problem = _problem(path, [path] * 3, prompts, architecture=becomes, gate=gate)
    report = make_mixture(problem, tmp_path / "out")
    made, plain = _load(tmp_path / "out"), _load(path)
    assert made.config.model_type == report.architecture
    torch.testing.assert_close(_logits(made), _logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_layer_is_the_sum_over_the_chosen_experts(
    dense: Dense, tmp_path: Path, family: str
) -> None:
    """Against the dense models' own MLPs, in float64, by the routers' rows on the disk."""
    experts = [dense(family, seed) for seed in (1, 2, 3)]
    make_mixture(_problem(dense(family), experts), tmp_path / "out")
    made = _load(tmp_path / "out", torch.float64)
    mlps = [_load(path, torch.float64).model.layers for path in experts]
    rows = [value for name, value in _weights(tmp_path / "out").items() if "mlp.gate." in name]
    rows = rows or [v for n, v in _weights(tmp_path / "out").items() if "moe.gate.weight" in n]
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for at, layer in enumerate(made.model.layers):
        logits = x @ rows[at].double().T
        top = logits.topk(2).indices
        p = logits.gather(1, top).softmax(1)
        answers = torch.stack([layers[at].mlp(x) for layers in mlps], 1)  # [n, E, d]
        wanted = (p[..., None] * answers[torch.arange(7)[:, None], top]).sum(1)
        torch.testing.assert_close(layer.mlp(x[None])[0], wanted, rtol=1e-6, atol=1e-6)


def test_tensors_are_the_models_own_bytes_under_their_new_names(
    dense: Dense, tmp_path: Path
) -> None:
    base, experts = dense(), [dense(seed=1), dense(seed=2)]
    make_mixture(_problem(base, experts), tmp_path / "out")
    made, plain = _weights(tmp_path / "out"), _weights(base)
    outside = {name for name in plain if ".mlp." not in name}
    assert all(torch.equal(made[name], plain[name]) for name in outside)
    roles = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for number, path in enumerate(experts):
        own = _weights(path)
        for layer in range(2):
            for ours, role in roles.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{ours}.weight"
                wanted = own[f"model.layers.{layer}.mlp.{role}.weight"]
                assert torch.equal(made.pop(name), wanted)
    gates = {f"model.layers.{at}.block_sparse_moe.gate.weight" for at in range(2)}
    assert made.keys() == outside | gates
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_noise_and_residual_scale(dense: Dense, tmp_path: Path) -> None:
    path = dense()
    each = {"noise_scale": 0.5, "residual_scale": 0.25}
    make_mixture(_problem(path, [path] * 2, each=each, seed=3), tmp_path / "one")
    make_mixture(_problem(path, [path] * 2, each=each, seed=3), tmp_path / "two")
    make_mixture(_problem(path, [path] * 2, each=each, seed=4), tmp_path / "other")
    one, two, other = (_weights(tmp_path / name) for name in ("one", "two", "other"))
    plain = _weights(path)
    noise = []
    for layer in range(2):
        for number in range(2):
            for ours, role in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{ours}.weight"
                assert torch.equal(one[name], two[name])
                assert not torch.equal(one[name], other[name])
                scale = 0.25 if ours == "w2" else 1.0
                was = plain[f"model.layers.{layer}.mlp.{role}.weight"]
                noise.append((one[name] / scale - was).flatten())
    drawn = torch.cat(noise)  # 4608 numbers: four standard errors
    assert abs(drawn.mean()) < 4 * 0.5 / len(drawn) ** 0.5
    assert abs(drawn.std() - 0.5) < 4 * 0.5 / (2 * len(drawn)) ** 0.5
    assert len({tuple(part[:3].tolist()) for part in noise}) == len(noise)  # none drawn twice


def test_a_shared_expert_without_a_gate_is_always_on(dense: Dense, tmp_path: Path) -> None:
    """Copies of a model with itself shared: every MLP adds twice what it did."""
    path = dense()
    shared = MixtureExpert(model=str(path))
    problem = _problem(path, [path] * 2, shared=shared, architecture="deepseek")
    make_mixture(problem, tmp_path / "out")
    plain = _load(path)
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
    found = _logits(_load(tmp_path / "out"))
    torch.testing.assert_close(found, _logits(plain), rtol=1e-5, atol=1e-5)


def test_a_shared_expert_with_prompts_has_a_row_of_its_own(dense: Dense, tmp_path: Path) -> None:
    path, other = dense("qwen2"), dense("qwen2", seed=1)
    shared = MixtureExpert(model=str(other), positive_prompts=("x",), residual_scale=0.5)
    prompts = [Prompts(((1, e),)) for e in (4, 7, 9)]
    problem = _problem(path, [path] * 2, prompts, shared=shared, gate="hidden")
    make_mixture(problem, tmp_path / "out")
    made, own = _weights(tmp_path / "out"), _weights(other)
    states = _load(path)(torch.tensor([[1, 9]]), output_hidden_states=True).hidden_states
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        assert torch.equal(
            made[f"{block}.shared_expert.down_proj.weight"], own[f"{block}.down_proj.weight"] / 2
        )
        row = torch.nn.functional.normalize(states[layer][0, -1], dim=0)
        torch.testing.assert_close(made[f"{block}.shared_expert_gate.weight"][0], row)


def test_the_rest_may_be_the_mean_of_the_experts(dense: Dense, tmp_path: Path) -> None:
    experts = [dense(seed=seed) for seed in (1, 2, 3)]
    make_mixture(_problem(dense(), experts, attention="mean"), tmp_path / "out")
    made, parts = _weights(tmp_path / "out"), [_weights(path) for path in experts]
    names = [name for name in parts[0] if ".mlp." not in name]
    assert len(names) == 15
    for name in names:
        wanted = torch.stack([part[name].double() for part in parts]).mean(0).float()
        torch.testing.assert_close(made[name], wanted, rtol=1e-6, atol=1e-7)


def test_an_expert_behind_an_adapter_is_the_merged_one(dense: Dense, tmp_path: Path) -> None:
    path = dense()
    adapter = small_adapters.train(
        path, tmp_path / "adapter", target_modules=["gate_proj", "down_proj", "q_proj"]
    )
    model = small_adapters.peft.PeftModel.from_pretrained(_load(path), adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    make_mixture(_problem(path, [Path(f"{path}+{adapter}"), path]), tmp_path / "one")
    make_mixture(_problem(path, [tmp_path / "merged", path]), tmp_path / "two")
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)


def test_a_mixture_that_was_cut_off_goes_on_without_running_the_base(
    dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [dense(seed=1), dense(seed=2)]
    prompts = [Prompts(((1, 4),)), Prompts(((1, 5),))]
    problem = _problem(dense(), experts, prompts, gate="hidden", each={"noise_scale": 0.1})
    make_mixture(problem, tmp_path / "whole", shard_bytes=10_000)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "writing the mixture" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_mixture(problem, tmp_path / "out", shard_bytes=10_000, progress=interrupt)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(mixture_export, "gate_rows", None)
    make_mixture(problem, tmp_path / "out", shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) > 6
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_merging_equal_experts_again_gives_the_dense_function(
    dense: Dense, tmp_path: Path, family: str
) -> None:
    path = dense(family)
    make_mixture(_problem(path, [path] * 3), tmp_path / "mixture")
    examples = [Example(tuple(range(3 + i, 9 + i))) for i in range(4)]
    mixture = Checkpoint.open(str(tmp_path / "mixture"))
    settings = ExpertSettings(keep=1)
    merge_experts(ExpertProblem(mixture, examples, settings), tmp_path / "out")
    found, wanted = _logits(_load(tmp_path / "out")), _logits(_load(path))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_dtype_and_what_it_cannot_hold(dense: Dense, tmp_path: Path) -> None:
    path = dense()
    make_mixture(_problem(path, [path] * 2, dtype="bfloat16"), tmp_path / "out")
    made, plain = _weights(tmp_path / "out"), _weights(path)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    stored = made["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert torch.equal(stored, plain[name].bfloat16())
    each = {"residual_scale": 1e6}
    with pytest.raises(MergeError, match=r"experts\.0\.w2\.weight: is too large for torch.float16"):
        make_mixture(_problem(path, [path] * 2, dtype="float16", each=each), tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_routers_that_cannot_tell_are_warned_of(
    dense: Dense, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experts = [dense(seed=1), dense(seed=2)]
    same = [Prompts(((1, 5),)), Prompts(((1, 5),))]
    with caplog.at_level(logging.WARNING):
        report = make_mixture(_problem(dense(), experts, same, gate="hidden"), tmp_path / "same")
    assert min(report.conditions) > 1e6
    assert "routers of all layers hardly tell the experts apart" in caplog.text
    assert "conditions" in (tmp_path / "same" / MIXTURE_FILE).read_text()
    caplog.clear()
    apart = [Prompts(((1, 5),)), Prompts(((1, 9),))]
    with caplog.at_level(logging.WARNING):
        report = make_mixture(_problem(dense(), experts, apart, gate="cheap_embed"), tmp_path / "x")
    rows = _weights(tmp_path / "x")["model.layers.0.block_sparse_moe.gate.weight"]
    values = torch.linalg.svdvals(rows.double())
    assert report.conditions[0] == pytest.approx(float(values[0] / values[-1]), rel=1e-5)
    assert max(report.conditions) < 5
    assert "tell" not in caplog.text


def test_what_cannot_be_made_is_refused_in_one_line(dense: Dense, tmp_path: Path) -> None:
    base = dense()
    biased = dense(attention_bias=True)
    wide = dense(seed=1, intermediate_size=40)
    words = dense(seed=1, vocab_size=50)
    mlp_bias = dense(mlp_bias=True)
    gpt2 = tmp_path / "gpt2"
    tiny_models.causal("gpt2").save_pretrained(gpt2)
    windows = dense("qwen3", **WINDOW, max_window_layers=1)
    moved = dense(seed=1)
    tokens = (*small_llama.TOKENS[:46], "w44", "w43")
    small_llama.tokenizer(tokens).save_pretrained(moved)
    qwen2, qwen3 = dense("qwen2"), dense("qwen3")
    shared = MixtureExpert(model=str(base))
    for problem, said in [
        (
            _problem(biased, [biased] * 2),
            r"self_attn.k_proj.bias: has no place in mixtral \(7 more",
        ),
        (_problem(mlp_bias, [mlp_bias] * 2), "has no place in an expert of mixtral"),
        (_problem(qwen2, [qwen2] * 2, architecture="mixtral"), "take architecture: qwen2_moe"),
        (_problem(base, [base] * 2, architecture="qwen3_moe"), r"needs it, .* mixtral or .* qwen2"),
        (_problem(qwen3, [qwen3] * 2, architecture="qwen2_moe"), "take architecture: qwen3_moe"),
        (_problem(gpt2, [gpt2] * 2), "is a gpt2; a mixture can be made of llama, mistral, qwen2"),
        (_problem(windows, [windows] * 2), "some of its layers look back 4 tokens only"),
        (_problem(base, [base] * 2, shared=shared, architecture="mixtral"), "mixtral has none"),
        (_problem(base, [base, wide]), r"'experts.1' is \[40, 16\]; all sources must share"),
        (_problem(base, [base, words]), r"'experts.1' is \[50, 16\]; all sources .* vocabulary"),
        (_problem(base, [base, moved]), "take an expert that has it too"),
        (_problem(base, [base, qwen2]), "model_type is 'qwen2'"),
        (_problem(base, [base]), "experts_per_token: 2, but there are 1 experts"),
    ]:
        with pytest.raises((MergeError, SpecError), match=said):
            make_mixture(problem, tmp_path / "out")
    broken = dense(seed=1)
    model = _load(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(NonFiniteTensor, match=r"up_proj\.weight"):
        make_mixture(_problem(base, [base, broken]), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ExportError, match="exists already"):
        make_mixture(_problem(base, [base] * 2), tmp_path / "full")
    assert not (tmp_path / "out").exists()
