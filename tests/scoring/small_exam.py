"""A tiny Llama with random weights and four lm-eval tasks whose outcomes it gets half right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from evomerge.zoo.vocabulary import EOS, build_tokenizer

ITEMS = 60
BATCH_SIZE = 8


@dataclass(frozen=True)
class Exam:
    """A checkpoint folder and a folder of tasks."""

    checkpoint: Path
    tasks: Path

    def load(self, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(self.checkpoint)


def random_llama(seed: int) -> Any:
    """A two-layer Llama whose random weights are large enough to say something definite."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(build_tokenizer(64)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    """Ten characters of greedy generation, one prompt at a time, by transformers itself."""
    ids = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def write_tasks(folder: Path, answer: Callable[[str], str]) -> None:
    folder.mkdir()
    for name, config in task_configs(write_items(folder, answer)).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}))


def write_items(folder: Path, answer: Callable[[str], str]) -> dict[str, str]:
    random = Random(5)
    rows = []
    for number in range(ITEMS):
        prompt = text(random, random.randint(4, 30)) + "="
        said = answer(prompt)
        truth = said if number % 2 else text(random, 4)
        choices = [text(random, random.randint(1, 5)) for _ in range(3)]
        rows.append(
            {
                "prompt": prompt,
                "answer": truth.split("e")[0].strip(),
                "start": (said[:2] or "x") if number % 2 else text(random, 2),
                "choices": choices,
                "label": random.randrange(3),
            }
        )
    shots = [{**row, "prompt": text(random, 3) + "="} for row in rows[:6]]
    files = {"test": rows, "train": shots}
    for name, content in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines)
    return {name: str(folder.resolve() / f"{name}.jsonl") for name in files}


def text(random: Random, length: int) -> str:
    return "".join(random.choice("abcdefghij 0123") for _ in range(length)).strip() or "a"


def task_configs(files: dict[str, str]) -> dict[str, dict[str, Any]]:
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    greedy = {"until": ["e", EOS], "do_sample": False, "max_gen_toks": 10}
    return {
        "choice": common
        | {
            "output_type": "multiple_choice",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "choice_shots": common
        | {
            "output_type": "multiple_choice",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "fewshot_split": "train",
            "num_fewshot": 2,
            "fewshot_delimiter": " ",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "continue": common
        | {
            "output_type": "loglikelihood",
            "doc_to_target": "{{start}}",
            "metric_list": [
                {"metric": "acc", **mean},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
        "generate": common
        | {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": greedy,
            "filter_list": [
                {"name": "raw", "filter": [{"function": "take_first"}]},
                {
                    "name": "tidy",
                    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
                },
            ],
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "rolling": common
        | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{prompt}}{{answer}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "beams": common
        | {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {**greedy, "num_beams": 2},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "sampled": common
        | {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {**greedy, "do_sample": True, "temperature": 1.0},
            "repeats": 2,
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
