"""A tiny Mixtral trained until its routing is uneven, and data for it that needs no download.

A sequence follows a rule xₜ₊₁ = a·xₜ + b mod 64, with another (a, b) for each of eight domains;
where it begins, and where it jumps to now and then, is drawn. Domains and drawn tokens fall off by
a power law, the router begins large and nothing balances its load: some experts come to be busier
than others. Knows nothing of merging.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.fitted.calibration import Example

TOKENS, DOMAINS = 64, 8
FALL = 2  # the k-th domain, and the k-th token among those drawn, by 1/k²
JUMPS = 0.1  # share of the tokens that are drawn
ROUTER = 20.0  # times transformers' initial values
LR = 3e-3
TRAINING = "training"

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """How long the model is trained, and how many sequences each part of the data has."""

    steps: int = 500
    batch: int = 32
    length: int = 32
    calibration: int = 256
    selection: int = 512
    report: int = 1024


def parts(setup: Setup, seed: int) -> dict[str, Tensor]:
    """Tokens [n, t] to train on, and of the three parts; no sequence is in two of them, or twice
    in one."""
    sizes = {
        TRAINING: setup.steps * setup.batch,
        "calibration": setup.calibration,
        "selection": setup.selection,
        "report": setup.report,
    }
    rows = distinct(sum(sizes.values()), setup.length, torch.Generator().manual_seed(seed))
    return dict(zip(sizes, rows.split(list(sizes.values())), strict=True))


def examples(tokens: Tensor) -> list[Example]:
    return [Example(tuple(row)) for row in tokens.tolist()]


def distinct(count: int, length: int, generator: torch.Generator) -> Tensor:
    """So many sequences [n, t], each once, in the order in which they were drawn."""
    rules = torch.randperm(TOKENS * TOKENS // 2, generator=generator)[:DOMAINS]
    factors, offsets = 2 * (rules // TOKENS) + 1, rules % TOKENS  # odd: every token is reached
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        rows = drawn(factors, offsets, count, length, generator)
        found.update(dict.fromkeys(map(tuple, rows.tolist())))
    return torch.tensor(list(found)[:count])


def drawn(
    factors: Tensor, offsets: Tensor, count: int, length: int, generator: torch.Generator
) -> Tensor:
    """Sequences [n, t] of domains with the rules factors [8], offsets [8]."""
    domains = falling(DOMAINS, count, generator)
    tokens = [falling(TOKENS, count, generator)]
    for _ in range(length - 1):
        by_rule = (factors[domains] * tokens[-1] + offsets[domains]) % TOKENS
        jumps = torch.rand(count, generator=generator) < JUMPS
        tokens.append(torch.where(jumps, falling(TOKENS, count, generator), by_rule))
    return torch.stack(tokens, 1)


def falling(choices: int, count: int, generator: torch.Generator) -> Tensor:
    """Numbers [n] below `choices`, small ones more often."""
    weights = torch.arange(1, choices + 1, dtype=torch.float64) ** -FALL
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def trained(setup: Setup, seed: int, folder: Path) -> Path:
    """The checkpoint of a seed in `folder`; trained there unless it was before."""
    known = [asdict(setup), TOKENS, DOMAINS, FALL, JUMPS, ROUTER, LR]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
    place, unfinished = (folder / f"{name}{seed}-{digest}" for name in ("mixtral-", "unfinished-"))
    if not place.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        model = train(setup, seed)
        save(model, unfinished)
        unfinished.rename(place)
    return place


def train(setup: Setup, seed: int) -> Any:
    """AdamW, a short warm-up and cosine decay; no loss that balances the experts."""
    torch.manual_seed(seed)
    model = mixtral(width=32, inner=32, layers=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(ROUTER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=setup.steps, pct_start=0.1
    )
    for tokens in parts(setup, seed)[TRAINING].split(setup.batch):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def save(model: Any, folder: Path) -> None:
    """A checkpoint with a tokenizer whose words are the tokens' numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(token): token for token in range(TOKENS)}, unk_token="0"))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def mixtral(*, width: int, inner: int, layers: int) -> Any:
    """8 experts, 2 for each token; transformers' initial values."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=TOKENS,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=512,
        )
    )
