"""Train the routers of a merged model to make it answer as the whole one does, and nothing else.

For a collapsed model, whose routers are new; for the other forms too, whose routers were trained
for experts that are gone. Decides no group and writes no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Model, Weights
from evomerge.errors import MergeError
from evomerge.merging.fitted.base import Watch
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.fitted.dam_losses import Teacher, kl
from evomerge.merging.fitted.descent import Descent, Saves, endless_batch
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.layers import ExpertLayer


def distilled_routers(
    model: Model,
    merged: Weights,
    layers: Sequence[ExpertLayer],
    examples: Sequence[Example],
    saves: Saves,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Tensor]:
    """Routers [K, d] float32 for every layer of `merged`, from those that it has.

        W = argmin Σ over tokens that count of KL(softmax(y) ‖ softmax(z))

    y are the logits of `model`, z those of `merged`. By Adam at a constant rate, which is a share
    of each router's root mean square, on batches drawn in rounds keyed by the seed; everything else
    stays as it is, biases of routers too. Which experts a token is sent to has no gradient: rows
    learn by the gate values of those it is.

    Memory: both models in float32. An earlier attempt in `saves` is gone on with, bit for bit.
    Raises MergeError for data without tokens to predict, and for a loss that is not finite.

    Source: router knowledge distillation after a compression, arXiv:2603.02217 (abstract), where
    all E rows are kept; for collapsed routers it is ours.
    """
    if not any(len(example.predicted) for example in examples):
        raise MergeError("calibration: no example has a token to predict; give longer ones")
    teacher, student = Network(model, device=device), _network(merged, device)
    names = [layer.router[0] for layer in layers]
    start = {name: merged.tensor(name).to(device, torch.float64) for name in names}
    sizes = {name: float(rows.square().mean().sqrt()) or 1.0 for name, rows in start.items()}
    scaled = {name: rows / sizes[name] for name, rows in start.items()}

    def step(number: int) -> Mapping[str, float]:
        batch = endless_batch(examples, number, batch_size, seed=seed, name="routers").to(device)
        for name, values in scaled.items():
            values.grad = torch.zeros_like(values)
            student.write(name, values * sizes[name])
        with torch.no_grad():
            wanted = teacher.logits(batch)[batch.counted]
        loss = kl(student.logits(batch)[batch.counted], Teacher(wanted), 1.0)
        return {"kl": student.backward(loss, batch, what=f"router distillation step {number}")}

    def take(name: str, gradient: Tensor) -> None:
        if name in scaled:
            scaled[name].grad = gradient.double() * sizes[name]

    descent = Descent(scaled, learning_rate, saves)
    with student.gradients(take, of=names):
        descent.run(steps, step, Watch(progress=progress), lambda: 0.0)
    return [(scaled[name] * sizes[name]).float().cpu() for name in names]


def _network(merged: Weights, device: str) -> Network:
    """A live model of tensors that lie in no folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    settings = dict(merged.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    live = auto.from_config(config, dtype=torch.float32).requires_grad_(False).eval().to(device)
    network = Network(merged, device=device, model=live)
    network.become(merged, merged.names)
    return network
