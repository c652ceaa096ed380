"""Train the base and the experts of a zoo: deterministic for a seed on one machine.

Knows nothing of the folder layout or the manifest. One torch thread whatever the caller uses:
several would change the order of sums, and with it the bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evomerge.threads import one_thread
from evomerge.zoo.batches import IGNORED, Batch, Logits, Mixture, exact_match, make_batch
from evomerge.zoo.recipe import BaseRecipe, ExpertRecipe, ZooRecipe
from evomerge.zoo.skills import TARGET_SKILLS, Draw, Split, distinct_items, make_skills
from evomerge.zoo.vocabulary import EOS_ID, PAD_ID, TOKENS, build_tokenizer

OnStep = Callable[[float], None]
"""Called after each step with the fraction of the model's training that is done."""


def train_base(recipe: ZooRecipe, seed: int, on_step: OnStep) -> Any:
    """Train the base model and return it, a `LlamaForCausalLM` in float32."""
    with one_thread(), _seeded(f"{seed} base"):
        model = _fresh_model(recipe)
        skills = make_skills(seed)
        weights = {name: 1.0 for name in skills} | recipe.base.target_weights
        mixture = Mixture(skills, weights, Random(f"{seed} base batches"))
        trainer = _Trainer(model, mixture, recipe.batch_size)
        _run_base(trainer, recipe.base, _validation_batches(skills, recipe.base, seed), on_step)
    return model


def train_expert(
    recipe: ZooRecipe, seed: int, name: str, base_directory: Path, on_step: OnStep
) -> Any:
    """Train the expert `name` from the base saved in `base_directory`, and return it."""
    from transformers import AutoModelForCausalLM

    expert = recipe.experts[name]
    with one_thread(), _seeded(f"{seed} {name}"):
        model = AutoModelForCausalLM.from_pretrained(base_directory, dtype=torch.float32)
        skills = make_skills(seed)
        mixture = Mixture(
            skills, _expert_weights(skills, name, expert), Random(f"{seed} {name} batches")
        )
        trainer = _Trainer(model, mixture, recipe.batch_size)
        for step in range(expert.steps):
            progress = (step + 1) / expert.steps
            trainer.step(expert.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))))
            on_step(progress)
    return model


def save_checkpoint(model: Any, recipe: ZooRecipe, directory: Path) -> None:
    """Write an ordinary Hugging Face checkpoint with its tokenizer into `directory`."""
    model.eval()
    model.save_pretrained(directory)
    build_tokenizer(recipe.model.context_tokens).save_pretrained(directory)


def model_logits(model: Any) -> Logits:
    """Return the function from token ids `[item, position]` to logits `[item, position, token]`."""

    def logits(tokens: Tensor) -> Tensor:
        result: Tensor = model(input_ids=tokens, use_cache=False).logits
        return result

    return logits


class _Trainer:
    """AdamW on the answers' cross-entropy; the caller owns the schedule."""

    def __init__(self, model: Any, mixture: Mixture, batch_size: int) -> None:
        self.logits = model_logits(model)
        self._parameters = list(model.parameters())
        self._mixture = mixture
        self._batch_size = batch_size
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0
        )
        model.train()

    def step(self, lr: float) -> None:
        batch = self._mixture.next_batch(self._batch_size)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        logits = self.logits(batch.tokens)
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()


def _run_base(
    trainer: _Trainer, base: BaseRecipe, validation: list[Batch], on_step: OnStep
) -> None:
    step = 0
    latest_start = base.max_steps - base.anneal_steps
    while step < latest_start and not _half_good(trainer, base, validation, step):
        step += 1
        trainer.step(base.lr * min(1.0, step / base.warmup_steps))
        on_step(min(0.75, step / base.expected_steps))
    for left in reversed(range(base.anneal_steps)):
        trainer.step(base.lr * (left + 1) / base.anneal_steps)
        on_step(1.0 - 0.25 * left / base.anneal_steps)


def _half_good(trainer: _Trainer, base: BaseRecipe, validation: list[Batch], step: int) -> bool:
    if step == 0 or step % base.check_every_steps:
        return False
    accuracies = [float(exact_match(trainer.logits, batch).float().mean()) for batch in validation]
    capped = [min(accuracy, base.accuracy_cap) for accuracy in accuracies]
    return sum(capped) / len(capped) >= base.accuracy_goal


def _validation_batches(skills: Mapping[str, Draw], base: BaseRecipe, seed: int) -> list[Batch]:
    rng = Random(f"{seed} validation")
    return [
        make_batch(distinct_items(skills[name], Split.VALIDATION, base.validation_items, rng))
        for name in TARGET_SKILLS
    ]


def _expert_weights(
    skills: Mapping[str, Draw], name: str, expert: ExpertRecipe
) -> dict[str, float]:
    others = [skill for skill in TARGET_SKILLS if skill != name]
    auxiliary = [skill for skill in skills if skill not in TARGET_SKILLS]
    weights = {skill: expert.other_targets / len(others) for skill in others}
    weights |= {skill: expert.auxiliary / len(auxiliary) for skill in auxiliary}
    return {name: 1.0 - expert.other_targets - expert.auxiliary} | weights


def _fresh_model(recipe: ZooRecipe) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = recipe.model
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context_tokens,
        initializer_range=size.initial_std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Random(name).getrandbits(63))
        yield
