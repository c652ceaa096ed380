"""Router rows from prompts: against transformers in float64, and where tokens go with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.calibration.mixture import open_mixture_problem
from evomerge.checkpoints import Checkpoint
from evomerge.documents import read_yaml
from evomerge.errors import SpecError
from evomerge.merging.structure.mixture.export import make_mixture
from evomerge.merging.structure.mixture.gates import Prompts, conditions, gate_rows
from evomerge.merging.structure.mixture.recipe import load_mixture, wants_mixture

PROMPTS = [
    Prompts(((1, 5, 9, 12), (1, 7)), ((1, 30, 31),)),
    Prompts(((1, 20),)),
    Prompts(((1, 5, 9, 11),), ((1, 6), (1, 7, 8))),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("llama") / "m", dtype=torch.float32)


@torch.no_grad()
def _states(model: Any, gate: str, tokens: Sequence[int]) -> Tensor:
    """h of one prompt for every layer [l, d], as transformers says."""
    read: list[Tensor] = []
    handles = [
        layer.post_attention_layernorm.register_forward_hook(lambda m, x, y: read.append(y[0, -1]))
        for layer in model.model.layers
    ]
    ran = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    if gate == "router_input":
        return torch.stack(read)
    if gate == "cheap_embed":
        summed = sum(model.model.embed_tokens.weight[token] for token in tokens)
        return torch.stack([summed] * len(model.model.layers))
    entering = [state[0] for state in ran.hidden_states[: len(model.model.layers)]]
    return torch.stack([s.mean(0) if gate == "hidden_avg" else s[-1] for s in entering])


def _wanted(model: Any, gate: str, own: Prompts) -> Tensor:
    sides = []
    for found in (own.positive, own.negative):
        states = [_states(model, gate, tokens) for tokens in found]
        if not states:
            sides.append(torch.zeros(()))
        elif gate == "cheap_embed":
            total = sum(states)
            sides.append(total / total.norm(dim=1, keepdim=True))
        else:
            sides.append(sum(states) / len(states))
    row = sides[0] - sides[1]
    return row / row.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "gate", ["hidden", "hidden_last", "hidden_avg", "router_input", "cheap_embed"]
)
def test_rows_are_those_of_the_formula(llama: Path, gate: str) -> None:
    found = gate_rows(gate, Checkpoint.open(str(llama)), PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    wanted = torch.stack([_wanted(model, gate, own) for own in PROMPTS], dim=1)
    assert found.shape == (2, 3, 32)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_gates_are_told_apart(llama: Path) -> None:
    """Only `hidden` and `hidden_last` are the same."""
    base = Checkpoint.open(str(llama))
    rows = {
        gate: gate_rows(gate, base, PROMPTS)
        for gate in ("hidden", "hidden_last", "hidden_avg", "router_input", "cheap_embed")
    }
    assert torch.equal(rows["hidden"], rows.pop("hidden_last"))
    for one in rows:
        for two in rows.keys() - {one}:
            assert (rows[one] - rows[two]).abs().max() > 0.1


def test_random_rows(llama: Path) -> None:
    base, none = Checkpoint.open(str(llama)), [Prompts(())] * 50
    normal, again = (gate_rows("random", base, none, seed=1) for _ in range(2))
    assert torch.equal(normal, again)
    assert not torch.equal(normal, gate_rows("random", base, none, seed=2))
    assert abs(float(normal.std()) - 1) < 4 / (2 * normal.numel()) ** 0.5  # four standard errors
    uniform, bound = gate_rows("uniform_random", base, none), 32**-0.5
    assert bound * 0.99 < float(uniform.abs().max()) <= bound
    assert float(uniform.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_conditions_are_ratios_of_singular_values() -> None:
    rows = torch.stack([torch.eye(3)[:2], torch.tensor([[1.0, 0, 0], [1, 0, 0]])])
    found = conditions(rows)
    assert found[0] == pytest.approx(1)
    assert found[1] > 1e6


def test_a_prompt_goes_to_its_expert(tiny_zoo: Path, tmp_path: Path) -> None:
    """Of one prompt each, `router_input` rows send the last token where it belongs in every layer:
    unit rows, and the row of the token itself has the largest product with it."""
    skills = {"sort": "s mpnta=", "reverse": "r vmeetu=", "lexicon": "t tef gav="}
    recipe = tmp_path / "recipe.yaml"
    experts = [f"{{model: {tiny_zoo / n}, positive_prompts: ['{p}']}}" for n, p in skills.items()]
    recipe.write_text(
        f"base_model: {tiny_zoo / 'base'}\ngate: router_input\nexperts_per_token: 1\n"
        f"experts: [{', '.join(experts)}]\n"
    )
    make_mixture(open_mixture_problem(recipe, device="cpu"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chosen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, x, y: chosen.append(int(y[2][-1, 0])))
    for expert, prompt in enumerate(skills.values()):
        chosen.clear()
        text = (tokenizer.bos_token or "") + prompt
        model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
        assert chosen == [expert] * len(model.model.layers)


MERGEKIT = """
base_model: NousResearch/Hermes-2-Pro-Mistral-7B
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: NousResearch/Hermes-2-Pro-Mistral-7B
    positive_prompts:
      - "<|im_start|>user\\nHello, who are you?<|im_end|>"
      - "<|im_start|>user\\nI need help with"
  - source_model: BioMistral/BioMistral-7B-DARE
    positive_prompts:
      - "As a doctor of medicine,"
  - source_model: PocketDoc/Dans-AdventurousWinds-7b
    positive_prompts:
      - "[Genres: Science Fiction]\\n[Tags: humor, old school, sci fi]"
      - "> get ye flask"
      - "[Mode: Interactive Storyteller]"
  - source_model: VAGOsolutions/SauerkrautLM-7b-HerO
    positive_prompts:
      - "<|im_start|>user\\nWie geht es dir?<|im_end|>"
      - "Das ist ein Satz auf Deutsch."
"""


def test_mergekits_own_example_is_read(tmp_path: Path) -> None:
    """The second configuration of its docs/moe.md."""
    path = tmp_path / "mergekit.yml"
    path.write_text(MERGEKIT)
    document: Any = read_yaml(path)
    assert wants_mixture(path)
    recipe = load_mixture(path)
    assert recipe.base_model == document["base_model"]
    assert (recipe.gate, recipe.dtype, recipe.experts_per_token) == ("hidden", "bfloat16", 2)
    for expert, entry in zip(recipe.experts, document["experts"], strict=True):
        assert expert.model == entry["source_model"]
        assert list(expert.positive_prompts) == entry["positive_prompts"]


def test_all_of_mergekits_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mergekit.yml"
    (tmp_path / "b").mkdir()
    path.write_text("""
base_model: {model: {path: a, revision: main}, lora: b}
gate_mode: uniform_random
architecture: Qwen
experts_per_token: 1
dtype: null
experts:
  - {source_model: b, noise_scale: 0.1, residual_scale: 0.5, negative_prompts: null}
  - {source_model: {model: a}}
shared_experts: [{source_model: b, positive_prompts: [x], residual_scale: 0.1}]
""")
    recipe = load_mixture(path)
    b = str(tmp_path / "b")
    assert recipe.base_model == f"a@main+{b}"
    assert [expert.model for expert in recipe.experts] == [b, "a"]
    assert (recipe.experts[0].noise_scale, recipe.experts[0].residual_scale) == (0.1, 0.5)
    assert recipe.shared is not None
    assert (recipe.shared.model, recipe.shared.residual_scale) == (b, 0.1)
    assert (recipe.architecture, recipe.dtype) == ("qwen", None)


TWO = "experts: [{model: b, positive_prompts: [x]}, {model: c, positive_prompts: [%s]}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TWO % "x", "experts: all have the same prompts"),
        ("experts: [{model: b}, {model: c}]\n", "experts.1.positive_prompts: gate: hidden needs"),
        (TWO % "y" + "gate: hiden\n", "did you mean 'hidden'"),
        (TWO % "y" + "architecture: mixtrall\n", "did you mean 'mixtral'"),
        (TWO % "y" + "experts_per_tok: 1\n", "did you mean 'experts_per_token'"),
        (TWO % "y" + "experts_per_token: 3\n", "experts_per_token: 3, but there are 2 experts"),
        (TWO % "y" + "gate: random\ngate_mode: hidden\n", "gate_mode: is gate in mergekit's words"),
        (TWO % "y" + "dtype: float8\n", "dtype: expected 'float32'"),
        ("experts: [{modle: b, positive_prompts: [x]}]\n", "did you mean 'model'"),
        ("experts: [{model: 3}, b]\n", "experts.0.model: expected a path or the name of a model"),
        (TWO % "y" + "shared_experts: [{model: b}, {model: c}]\n", "shared_experts: expected one"),
    ],
)
def test_a_faulty_file_is_refused_in_plain_words(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base_model: a\n{text}")
    with pytest.raises(SpecError) as refused:
        load_mixture(path)
    assert said in str(refused.value)


def test_prompts_stand_after_the_first_token_if_there_is_one(llama: Path, tmp_path: Path) -> None:
    own = small_llama.save(tmp_path / "own", dtype=torch.float32)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base_model: own\nexperts:\n  - {{model: {llama}, positive_prompts: ['w3']}}\n"
        f"  - {{model: {llama}, positive_prompts: ['']}}\n"
    )
    found = open_mixture_problem(path, device="cpu").prompts
    assert [each.positive for each in found] == [((1, 6),), ((1,),)]
    tokenizer = small_llama.tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(own)
    with pytest.raises(SpecError, match="the prompt '' has no tokens"):
        open_mixture_problem(path, device="cpu")
