"""Shared contexts and few-shot prefixes: the same outcomes as lm-eval's HFLM, for fewer tokens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from small_exam import random_llama, text

from evomerge.scoring.engine import Engine
from evomerge.scoring.near_ties import Choice, NearTies
from evomerge.scoring.shared_context import common_prefix
from evomerge.zoo.vocabulary import TOKENS, build_tokenizer

LENGTH = 96
SIZE: dict[str, Any] = {"vocab_size": len(TOKENS), "bos_token_id": None, "eos_token_id": 1}
SIZE |= {"initializer_range": 0.15, "pad_token_id": 0}
LLAMA: dict[str, Any] = SIZE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
GEMMA = LLAMA | {"head_dim": 8, "tie_word_embeddings": False, "attn_implementation": "eager"}
GPT2 = SIZE | {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "gpt2": ("GPT2", GPT2),
    "qwen2": ("Qwen2", LLAMA),
    "gemma2": ("Gemma2", GEMMA | {"sliding_window": 4 * LENGTH}),
}
WINDOWED = ("Gemma2", GEMMA | {"sliding_window": 16})
RECURRENT = ("Mamba", SIZE | {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2})


def build(kind: str, options: dict[str, Any]) -> Any:
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokenizer() -> Any:
    made = build_tokenizer(LENGTH)
    made.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}[answer]"
    return made


def item(task: str, number: int, pairs: list[tuple[str, str]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", {}, pair, place, metadata=(task, number, 1))
        for place, pair in enumerate(pairs)
    ]


def requests() -> list[list[Any]]:
    """Items of several tasks; every case in which a request is laid out differently."""
    random = Random(3)
    head = text(random, 40) + "="
    items = []
    for number in range(12):
        asked = text(random, random.randint(2, 20)) + "="
        long = [text(random, random.randint(1, 25)) for _ in range(4)]
        letters = random.sample("abcdefgh", 4)
        chat = tokenizer().apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        items += [
            item("few_shot", number, [(head + asked, letter) for letter in letters]),
            item("endings", number, [(asked, ending) for ending in [*long, long[0]]]),
            item("chat", number, [(chat, ending) for ending in long[:2]]),
            item("nested", number, [(asked, "ab"), (asked, "abc"), (asked + "a", "xy")]),
            item("mutual", number, [(c, e) for c in (asked, "") for e in letters]),
            item("too_long", number, [(head * 2 + asked, e) for e in (*long, "a", "b")]),
            item("single", number, [(asked, long[0])]),
        ]
    return items


def flat(items: list[list[Any]]) -> list[Any]:
    return [request for one in items for request in one]


def theirs(model: Any, instances: list[Any], batch_size: int) -> list[tuple[float, bool]]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=batch_size)
    answers: list[tuple[float, bool]] = lm.loglikelihood(instances, disable_tqdm=True)
    return answers


def ours(model: Any, instances: list[Any], batch_size: int, share: bool) -> Any:
    engine = Engine(model, tokenizer(), batch_size=batch_size, share_context=share)
    return engine.prepare(instances).run()


@contextlib.contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of everything that the model reads meanwhile."""
    seen: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _m, inputs, _k: seen.append(tuple(inputs[0].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def assert_same(items: list[list[Any]], found: list[Any], expected: list[Any]) -> None:
    """Equal choices by every way of comparing, equal greedy flags, log-likelihoods to 1e-5."""
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-5, rel=1e-6)
    places = iter(range(len(found)))
    for one in items:
        own = [next(places) for _ in one]
        for length in (lambda text: 1, len):
            best = [
                max(own, key=lambda p: values[p][0] / length(one[p - own[0]].args[1]))
                for values in (found, expected)
            ]
            assert best[0] == best[1]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("name", MODELS)
def test_outcomes_are_hflms_item_by_item(name: str, batch_size: int, share: bool) -> None:
    model, items = build(*MODELS[name]), requests()
    instances = flat(items)
    expected = theirs(model, instances, batch_size)
    assert_same(items, ours(model, instances, batch_size, share), expected)
    assert len({round(value, 3) for value, _ in expected}) > len(items)  # there is something to see


@pytest.mark.parametrize("kind", [WINDOWED, RECURRENT], ids=["window", "recurrent"])
def test_models_that_cannot_share_are_scored_plainly(kind: tuple[str, dict[str, Any]]) -> None:
    model, items = build(*kind), requests()
    instances = flat(items)
    assert_same(items, ours(model, instances, 5, True), theirs(model, instances, 5))


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prefix_and_context_are_read_once(name: str) -> None:
    model = build(*MODELS[name])
    for task, most in (("few_shot", 0.35), ("endings", 0.75)):
        instances = flat([i for i in requests() if i[0].task_name == task])
        tokens = []
        for share in (False, True):
            program = Engine(model, tokenizer(), batch_size=5, share_context=share).prepare(
                instances
            )
            program.run()  # the first time it is tried whether the model can share
            with passes(model) as seen:
                program.run()
            tokens.append(sum(rows * length for rows, length in seen))
        assert tokens[1] <= most * tokens[0]


def test_a_pass_stays_within_the_tokens_of_a_batch() -> None:
    model, instances = build(*MODELS["llama"]), flat(requests())
    program = Engine(model, tokenizer(), batch_size=3, share_context=True).prepare(instances)
    with passes(model) as seen:
        program.run()
    assert max(rows * length for rows, length in seen) <= 3 * LENGTH
    assert max(rows for rows, _ in seen) > 3


def test_rounding_errors_are_no_larger_than_hflms() -> None:
    """Against the same model in float64, on weights large enough for errors to be seen."""
    model, instances = random_llama(seed=1), flat(requests())
    exact = ours(copy.deepcopy(model).double(), instances, 8, False)

    def error(answers: Any) -> float:
        return max(abs(a - b) for (a, _), (b, _) in zip(answers, exact, strict=True))

    assert error(ours(model, instances, 8, True)) <= 2 * error(theirs(model, instances, 8))


def test_ties_fall_as_hflm_lets_them_fall() -> None:
    """All tokens are equally likely: every comparison is a tie, and replies are equal exactly."""
    model, instances = build(*MODELS["qwen2"]), flat(requests())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert ours(model, instances, 5, True) == theirs(model, instances, 5)


def test_near_ties_are_computed_again_as_hflm_computes_them() -> None:
    """Two letters whose embeddings differ by a rounding error: replies of those items are HFLM's
    to the last digit."""
    model = build("Llama", LLAMA | {"tie_word_embeddings": True})
    a, b = (TOKENS.index(letter) for letter in "ab")
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[b] = weight[a] * (1 + 1e-6)
    random = Random(4)
    asked = [text(random, 20) + "=" for _ in range(10)]
    items = [item("t", n, [(q, letter + "cd") for letter in "ab"]) for n, q in enumerate(asked)]
    assert ours(model, flat(items), 4, True) == theirs(model, flat(items), 4)


def test_a_model_that_ignores_positions_is_found_out() -> None:
    """Padding between a context and its endings then shifts them; it must not be believed."""
    model, items = build(*MODELS["gpt2"]), requests()
    forward = type(model).forward

    def deaf(self: Any, input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
        return forward(self, input_ids, **options)

    model.forward = deaf.__get__(model)
    model.forward.__func__.__signature__ = __import__("inspect").signature(forward)
    instances = flat(items)
    assert_same(items, ours(model, instances, 5, True), theirs(model, instances, 5))


def test_a_model_that_wants_its_own_kind_of_cache() -> None:
    model, items = build(*MODELS["llama"]), requests()
    forward = model.forward

    def picky(*inputs: Any, past_key_values: Any = None, **options: Any) -> Any:
        if past_key_values is not None:
            past_key_values.a_method_of_its_own()
        return forward(*inputs, past_key_values=past_key_values, **options)

    picky.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    model.forward = picky
    instances = flat(items)
    assert_same(items, ours(model, instances, 5, True), theirs(model, instances, 5))


def test_half_precision_shares_only_if_told_to() -> None:
    model = build(*MODELS["llama"]).to(torch.bfloat16)
    instances = flat(requests())
    assert not Engine(model, tokenizer(), batch_size=4).share_context
    assert Engine(model.float(), tokenizer(), batch_size=4).share_context
    model.to(torch.bfloat16)
    values = [[v for v, _ in ours(model, instances, 4, share)] for share in (False, True)]
    assert values[0] == pytest.approx(values[1], rel=0.02, abs=0.1)
    assert values[0] == [v for v, _ in theirs(model, instances, 4)]


def written(prompts: list[str], stop: str = "e") -> list[Any]:
    from lm_eval.api.instance import Instance

    options = {"until": [stop], "do_sample": False, "max_gen_toks": 12}
    return [
        Instance("generate_until", {}, (prompt, dict(options)), 0, metadata=("g", number, 1))
        for number, prompt in enumerate(prompts)
    ]


def few_shot_prompts() -> list[str]:
    random = Random(6)
    head = text(random, 45) + "="
    return [head + text(random, random.randint(1, 30)) + "=" for _ in range(14)]


@pytest.mark.parametrize("kind", [*MODELS.values(), WINDOWED], ids=[*MODELS, "window"])
def test_texts_behind_a_shared_prefix_are_hflms(kind: tuple[str, dict[str, Any]]) -> None:
    from lm_eval.models.huggingface import HFLM

    model, instances = build(*kind), written(few_shot_prompts())
    lm = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=4)
    expected = lm.generate_until(instances, disable_tqdm=True)
    for share in (True, False):
        assert ours(model, instances, 4, share) == expected
    assert len(set(expected)) > 3


def test_a_prefix_of_prompts_is_read_once() -> None:
    model, instances = build(*MODELS["llama"]), written(few_shot_prompts())
    tokens = []
    for share in (False, True):
        program = Engine(model, tokenizer(), batch_size=5, share_context=share).prepare(instances)
        program.run()
        with passes(model) as seen:
            program.run()
        tokens.append(sum(rows * length for rows, length in seen))
    assert tokens[1] < 0.6 * tokens[0]


def test_a_text_that_was_nearly_a_tie_is_written_again() -> None:
    """All tokens are equally likely: every batch is run without the prefix, after one step with."""
    model, instances = build(*MODELS["qwen2"]), written(few_shot_prompts())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert ours(model, instances, 4, True) == ours(model, instances, 4, False)


def test_common_prefix_leaves_every_context_a_token() -> None:
    assert common_prefix([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3)]) == 2
    assert common_prefix([(1, 2), (3, 4)]) == 0
    assert common_prefix([(7,)]) == 0


class TestNearTies:
    """Which items are computed again."""

    def found(self, texts: list[str], values: list[float]) -> set[int]:
        choices = [Choice(i, "q", continuation) for i, continuation in enumerate(texts)]
        return NearTies([choices], 1e-3).find(dict(enumerate(values)))

    def test_by_likelihood(self) -> None:
        assert self.found(["a", "b", "c"], [-1.0, -1.0005, -9.0]) == {0, 1, 2}
        assert self.found(["a", "b", "c"], [-1.0, -1.01, -1.0101]) == set()

    def test_by_character_and_by_byte(self) -> None:
        assert self.found(["a", "bb"], [-1.0, -2.0001]) == {0, 1}
        assert self.found(["ab", "é"], [-1.0, -1.0001 / 2 * 1.5]) == set()
        assert self.found(["abc", "é"], [-3.0, -2.0001]) == {0, 1}

    def test_the_same_answer_twice_is_no_tie(self) -> None:
        assert self.found(["a", "a", "b"], [-1.0, -1.0, -2.0]) == set()

    def test_less_the_unconditional_likelihood(self) -> None:
        pairs = [("q", "a"), ("q", "b"), ("", "a"), ("", "b")]
        choices = [Choice(i, *pair) for i, pair in enumerate(pairs)]
        values = {0: -1.0, 1: -3.0, 2: -2.0, 3: -4.0005}
        assert NearTies([choices], 1e-3).find(values) == {0, 1, 2, 3}
        assert NearTies([choices], 1e-3).find(values | {3: -4.1}) == set()
