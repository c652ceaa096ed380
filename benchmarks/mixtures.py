"""The zoo's models as a mixture: how well each gate sends prompts to their expert, and the scores.

    evomerge zoo ZOO
    python benchmarks/mixtures.py ZOO

The base and four experts, the first PROMPTS prompts of each task for each expert's router rows.
`own` and `new`: the share of layers in which the last token of a prompt goes to the task's expert
first, of those prompts and of the next 36. Scores: the share of right answers (greedy) to the items
from the 41st to the 140th of each task.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SKILLS = ("sort", "reverse", "lexicon", "compare")
GATES = ("hidden", "hidden_avg", "router_input", "cheap_embed", "random")
PROMPTS, SEEN = 4, 40


class Zoo:
    """A zoo's folder: its tasks' items and how models do on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
        data = folder / "tasks/data"
        self.items = {
            name: [json.loads(line) for line in (data / f"{name}.jsonl").open()] for name in SKILLS
        }

    def tokens(self, items: list[dict[str, Any]]) -> Any:
        texts = [(self.tokenizer.bos_token or "") + item["prompt"] for item in items]
        found = self.tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    def recipe(self, gate: str, attention: str, top: int) -> dict[str, Any]:
        experts = [
            {
                "model": str(self.folder / name),
                "positive_prompts": [item["prompt"] for item in self.items[name][:PROMPTS]],
            }
            for name in SKILLS
        ]
        return {"base_model": str(self.folder / "base"), "experts": experts, "gate": gate,
                "attention": attention, "experts_per_token": top}  # fmt: skip

    @torch.no_grad()
    def scores(self, model: Any) -> str:
        shares = []
        for name in SKILLS:
            items = self.items[name][SEEN : SEEN + 100]
            given = self.tokens(items)
            made = model.generate(**given, max_new_tokens=10, do_sample=False)
            answers = self.tokenizer.batch_decode(
                made[:, given["input_ids"].shape[1] :], skip_special_tokens=True
            )
            right = [a.strip() == i["answer"] for a, i in zip(answers, items, strict=True)]
            shares.append(sum(right) / len(right))
        return " ".join(f"{s:.2f}" for s in shares) + f" mean {sum(shares) / len(shares):.3f}"

    @torch.no_grad()
    def routing(self, model: Any) -> str:
        first: list[int] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda m, x, y: first.append(int(y[2][-1, 0])))
        hits: dict[str, list[bool]] = {"own": [], "new": []}
        for expert, name in enumerate(SKILLS):
            for number, item in enumerate(self.items[name][:SEEN]):
                first.clear()
                model(self.tokens([item])["input_ids"])
                hits["own" if number < PROMPTS else "new"] += [one == expert for one in first]
        return ", ".join(f"{key} {sum(of) / len(of):.3f}" for key, of in hits.items())


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _merged(recipe: dict[str, Any], place: Path) -> Any:
    path = place / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    subprocess.run(["evomerge", "merge", path, place / "out"], check=True, capture_output=True)
    return _load(place / "out")


def _rows(zoo: Zoo) -> Iterator[str]:
    for name in ("base", *SKILLS):
        yield f"{name}: {zoo.scores(_load(zoo.folder / name))}"
    sources = {n: {"path": str(zoo.folder / n), "weight": 0.25} for n in SKILLS}
    with tempfile.TemporaryDirectory() as place:
        model = _merged({"method": "linear", "sources": sources}, Path(place))
        yield f"linear: {zoo.scores(model)}"
    for top in (1, 2):
        for attention in ("base", "mean"):
            for gate in GATES:
                with tempfile.TemporaryDirectory() as place:
                    model = _merged(zoo.recipe(gate, attention, top), Path(place))
                scored, routed = zoo.scores(model), zoo.routing(model)
                yield f"top {top}, attention {attention}, {gate}: {scored}; {routed}"


if __name__ == "__main__":
    for row in _rows(Zoo(Path(sys.argv[1]))):
        print(row, flush=True)
