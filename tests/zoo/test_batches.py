"""The zoo's batches: labels only on answers, and accuracy that equals real generation."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.zoo.batches import IGNORED, exact_match, make_batch
from evomerge.zoo.recipe import ZooRecipe
from evomerge.zoo.skills import Item
from evomerge.zoo.tasks import task_items
from evomerge.zoo.training import model_logits
from evomerge.zoo.vocabulary import EOS_ID, PAD_ID, encode


def test_labels_by_hand() -> None:
    batch = make_batch([Item("m 12=", "2"), Item("c ab=", "ab")])
    assert batch.tokens.tolist() == [[*encode("m 12=2"), PAD_ID], encode("c ab=ab")]
    two, ab = encode("2"), encode("ab")
    assert batch.labels.tolist() == [
        [IGNORED] * 4 + [*two, EOS_ID, IGNORED],
        [IGNORED] * 4 + [*ab, EOS_ID],
    ]


def test_exact_match_needs_the_whole_answer_and_its_end() -> None:
    batch = make_batch([Item("c ab=", "ab")] * 3)
    chosen = batch.labels.clamp(min=0)
    chosen[1, -1] = PAD_ID  # does not end
    chosen[2, -3] = PAD_ID  # first letter wrong
    logits = torch.nn.functional.one_hot(chosen, num_classes=100).float()
    assert exact_match(lambda _: logits, batch).tolist() == [True, False, False]


def test_exact_match_is_what_generation_gives(tiny_zoo: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_zoo / "compare")
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / "compare")
    outcomes = set()
    for name, items in task_items(ZooRecipe.tiny(), 0).items():
        matches = exact_match(model_logits(model), make_batch(items)).tolist()
        prompts = tokenizer([item.prompt for item in items], return_tensors="pt", padding=True)
        generated = model.generate(**prompts, max_new_tokens=9, do_sample=False)
        answers = tokenizer.batch_decode(
            generated[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
        )
        expected = [text == item.answer for text, item in zip(answers, items, strict=True)]
        assert matches == expected, name
        outcomes |= set(expected)
    assert outcomes == {True, False}
