"""What shared contexts save: the resident scorer against lm-eval's own HFLM on prepared requests.

Both score the same tokenised requests with the same weights of a Llama of 0.5M parameters, 2,048
words in its vocabulary: five-shot items that begin alike, and zero-shot items with four long
endings. Prints CPU seconds of one candidate, and the ratio to HFLM at the same batch size and at
its own best. The target: at most half of either, outcomes equal item by item.

    python benchmarks/shared_context_cost.py [--items 60] [--repeats 5]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch

BATCH_SIZE = 16
PEER_BATCH_SIZES = (1, 4, 16, 64)
LIMIT = 0.5
LENGTH = 512
Answers = list[tuple[float, bool]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = build_model(), build_tokenizer()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", end="; ")
    print(f"{arguments.items} items; CPU seconds of one candidate, least of {arguments.repeats}")
    missed = False
    for name, items in EXAMS.items():
        missed |= compare(name, items(arguments.items), model, tokenizer, arguments.repeats)
    return 1 if missed else 0


def compare(
    name: str, items: list[list[tuple[str, str]]], model: Any, tokenizer: Any, repeats: int
) -> bool:
    """Measure one exam and print it; whether a target was missed."""
    instances = requests(items)
    runs = {
        f"HFLM batch {size}": peer(model, tokenizer, instances, size) for size in PEER_BATCH_SIZES
    }
    runs["plain"] = ours(model, tokenizer, instances, share=False)
    runs["shared"] = ours(model, tokenizer, instances, share=True)
    seconds, answers = measure(runs, repeats)
    same = seconds[f"HFLM batch {BATCH_SIZE}"]
    best = min(value for run, value in seconds.items() if run.startswith("HFLM"))
    print(f"{name}: {token_shares(items)}")
    for run, value in seconds.items():
        print(f"  {run:16}{value:8.3f}   {value / same:5.2f} of HFLM batch {BATCH_SIZE}")
    expected = answers[f"HFLM batch {BATCH_SIZE}"]
    if outcomes(items, answers["shared"]) != outcomes(items, expected):
        sys.exit("outcomes differ")
    error = max(abs(a - b) for (a, _), (b, _) in zip(answers["shared"], expected, strict=True))
    print(f"  outcomes equal item by item; log-likelihoods differ by at most {error:.1e}")
    verdicts = []
    for peer_name, limit in ((f"HFLM batch {BATCH_SIZE}", same), ("HFLM's best", best)):
        ratio = seconds["shared"] / limit
        verdicts.append(ratio > LIMIT)
        verdict = "MISSED" if ratio > LIMIT else "ok"
        print(f"  shared / {peer_name}: {ratio:.2f}   (target {LIMIT:g}, {verdict})")
    return any(verdicts)


def measure(
    runs: dict[str, Callable[[], Answers]], repeats: int
) -> tuple[dict[str, float], dict[str, Answers]]:
    """The least CPU seconds of each, taken in turns so that a busy machine is fair to all."""
    answers = {name: run() for name, run in runs.items()}  # once, to warm up
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - started)
    return seconds, answers


def peer(model: Any, tokenizer: Any, instances: Sequence[Any], size: int) -> Callable[[], Answers]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
    prepared = [(one.args, *lm._encode_pair(*one.args)) for one in instances]

    def run() -> Answers:
        with torch.inference_mode():
            answers: Answers = lm._loglikelihood_tokens(prepared, disable_tqdm=True)
            return answers

    return run


def ours(
    model: Any, tokenizer: Any, instances: Sequence[Any], share: bool
) -> Callable[[], Answers]:
    from evomerge.scoring.engine import Engine

    engine = Engine(model, tokenizer, batch_size=BATCH_SIZE, share_context=share)
    return engine.prepare(instances).run


def outcomes(items: list[list[tuple[str, str]]], answers: Answers) -> list[tuple[Any, ...]]:
    """For each item the choice by log-likelihood, by that per character, and the greedy flags."""
    results, rest = [], iter(answers)
    for pairs in items:
        values, greedy = zip(*(next(rest) for _ in pairs), strict=True)
        per_character = [v / len(end) for v, (_, end) in zip(values, pairs, strict=True)]
        results.append((values.index(max(values)), per_character.index(max(per_character)), greedy))
    return results


def token_shares(items: list[list[tuple[str, str]]]) -> str:
    """How many tokens there are at least to be read, with and without sharing."""
    from evomerge.scoring.shared_context import common_prefix

    plain = sum(len(f"{c}{e}".split()) - 1 for pairs in items for c, e in pairs)
    endings = sum(len(e.split()) - 1 for pairs in items for _, e in pairs)
    contexts = [tuple(pairs[0][0].split()) for pairs in items]
    prefix = common_prefix(contexts)
    shared = prefix + sum(len(context) - prefix for context in contexts) + endings
    return f"{plain} tokens plain, {shared} shared ({shared / plain:.2f})"


def requests(items: list[list[tuple[str, str]]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", {}, pair, place, metadata=("exam", number, 1))
        for number, pairs in enumerate(items)
        for place, pair in enumerate(pairs)
    ]


def words(random: Random, least: int, most: int) -> str:
    return "".join(f" w{random.randrange(2000)}" for _ in range(random.randint(least, most)))


def five_shot(count: int) -> list[list[tuple[str, str]]]:
    random = Random(1)
    head = words(random, 250, 250)
    contexts = [head + words(random, 35, 50) for _ in range(count)]
    return [[(context, words(random, 3, 8)) for _ in range(4)] for context in contexts]


def long_endings(count: int) -> list[list[tuple[str, str]]]:
    random = Random(2)
    contexts = [words(random, 40, 80) for _ in range(count)]
    return [[(context, words(random, 20, 36)) for _ in range(4)] for context in contexts]


EXAMS = {
    "5-shot, shared prefix": five_shot,
    "0-shot, 4 long endings": long_endings,
}


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(2045))]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    sys.exit(main())
