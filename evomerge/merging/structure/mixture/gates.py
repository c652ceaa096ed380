"""The rows of a mixture's routers: what the base computes on prompts that an expert is meant for.

Knows no recipe file, no architecture and no tokenizer: tokens of prompts in, rows out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Model
from evomerge.errors import MergeError
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.mixture.recipe import RANDOM_GATES

DEGENERATE = 5.0
"""Condition number of a layer's rows above which they hardly tell the experts apart."""

_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Prompts:
    """The tokens of one expert's prompts."""

    positive: tuple[tuple[int, ...], ...]
    negative: tuple[tuple[int, ...], ...] = ()


State = Callable[[Sequence[int]], Tensor]
"""What a prompt is to each layer, [l, d]."""


def gate_rows(
    gate: str,
    base: Model,
    prompts: Sequence[Prompts],
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Tensor:
    """Router rows [l, E, d] in float32, for E experts' prompts.

        row = v/|v|,   v = mean over positive prompts of h(p) - mean over negative ones of h(p)

    h is, for every layer: of `hidden` and `hidden_last` the residual stream that enters the layer,
    at the last token; of `hidden_avg` its mean over the tokens; of `router_input` what the layer's
    MLP, and so its router, reads at the last token. `cheap_embed` has h the sum of the token
    embeddings, the same for all layers, sums over prompts and divides both sums by their norm
    before it subtracts. `random` is N(0, 1), `uniform_random` U(-1/√d, 1/√d), keyed by `seed`.
    The base is run in float32, one prompt at a time. `progress` is told the prompts done.

    Source: mergekit 0.1.4, mergekit/moe/router.py, which runs the base in bfloat16. There
    `hidden_avg` of prompts of several lengths counts padding; here it does not. `router_input` is
    ours: an expert's single positive prompt then scores highest with that expert's row.
    """
    layers, width = _sizes(base)
    if gate in RANDOM_GATES:
        return _random(gate, (layers, len(prompts), width), seed)
    sums = gate == "cheap_embed"
    total = sum(len(own.positive) + len(own.negative) for own in prompts)
    done = 0

    def side(found: Sequence[Sequence[int]], state: State) -> Tensor:
        nonlocal done
        states = []
        for tokens in found:
            states.append(state(tokens).double().cpu())
            done += 1
            progress(done, total)
        whole = torch.stack(states)  # [n, l, d]
        return _unit(whole.sum(0)) if sums else whole.mean(0)

    rows = []
    with _state(gate, base, device) as state:
        for own in prompts:
            row = side(own.positive, state)
            if own.negative:
                row -= side(own.negative, state)
            rows.append(_unit(row))
    found = torch.stack(rows, dim=1)
    if not torch.isfinite(found).all():
        raise MergeError(f"{base.path}: answers a prompt with NaN or infinity")
    return found.expand(layers, -1, -1).float().contiguous()


def conditions(rows: Tensor) -> list[float]:
    """Condition number of each layer's rows [l, E, d]: above `DEGENERATE` some experts will hardly
    be used."""
    return [float(torch.linalg.cond(layer.double())) for layer in rows]


def _sizes(base: Model) -> tuple[int, int]:
    return int(base.config["num_hidden_layers"]), int(base.config["hidden_size"])


def _random(gate: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if gate == "random":
        return torch.randn(shape, generator=generator)
    bound = math.sqrt(1.0 / shape[-1])
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return unit


@contextmanager
def _state(gate: str, base: Model, device: str) -> Iterator[State]:
    if gate == "cheap_embed":
        embeddings = base.tensor(_EMBEDDINGS)
        yield lambda tokens: embeddings[torch.tensor(tokens)].double().sum(0, keepdim=True)
        return
    network = Network(base, device=device)
    model: Any = network.model
    if gate == "router_input":
        with _watched(model) as read:
            yield lambda tokens: (_run(model, tokens, device), torch.stack(read))[1]
        return
    last = gate != "hidden_avg"

    def entering(tokens: Sequence[int]) -> Tensor:
        ran = _run(model, tokens, device)
        states: Tensor = torch.stack(ran.hidden_states[:-1])[:, 0]  # [l, t, d]
        return states[:, -1] if last else states.mean(1)

    yield entering


def _run(model: Any, tokens: Sequence[int], device: str) -> Any:
    ids = torch.tensor([tokens], device=device)
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True, use_cache=False)


@contextmanager
def _watched(model: Any) -> Iterator[list[Tensor]]:
    """What the MLPs of all layers read at the last token, [d] each, anew with every run."""
    layers = model.model.layers
    read: list[Tensor] = [torch.empty(0)] * len(layers)
    handles = []
    for number, layer in enumerate(layers):

        def look(module: Any, given: tuple[Tensor], number: int = number) -> None:
            read[number] = given[0][0, -1]

        handles.append(layer.mlp.register_forward_pre_hook(look))
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
