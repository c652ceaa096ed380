"""Compress merged experts on data: gradients choose rows, or the model is trained while rows go.

The student is the merged model in a network of the whole one's shape, every expert written as what
its group became; the teacher is the model before the merge (its neurons in another order are the
same function). Writes no checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Model, Weights
from evomerge.errors import MergeError
from evomerge.merging.fitted.calibration import Batch, Example, batches
from evomerge.merging.fitted.descent import endless_batch
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.compression import Compressed, decomposed
from evomerge.merging.structure.experts.distillation import distil, distillation_loss
from evomerge.merging.structure.experts.layers import ExpertLayer
from evomerge.merging.structure.experts.plan import LayerPlan
from evomerge.merging.structure.experts.pruning import (
    blended,
    kept_rows,
    remaining,
    row_importance,
)
from evomerge.merging.structure.experts.saves import AsideSaves
from evomerge.merging.structure.experts.settings import CompressSettings, ExpertSettings
from evomerge.merging.structure.weight_files import Computed, Progress

_RESULT = "result"


@dataclass(frozen=True)
class CompressedExperts:
    """What came of a compression, float32.

    `matrices` by the name that the remapped form gives the whole matrix; `trained` are the other
    tensors that training has changed, by stored name; `curve` the losses of its steps.
    """

    matrices: Mapping[str, Compressed]
    trained: Mapping[str, Tensor]
    curve: Sequence[float]


def check_compressible(
    model: Weights, layers: Sequence[ExpertLayer], settings: ExpertSettings
) -> None:
    """Raise MergeError where the experts cannot be compressed as the settings say."""
    if settings.compress is None:
        return
    places = [at for at in range(len(layers)) if at not in settings.skip]
    if not places:
        raise MergeError(
            "experts.compress: all layers are skipped, so there is nothing to compress"
        )
    ranks = settings.compress.ranks(len(layers))
    if len(ranks) != len(layers):
        raise MergeError(f"experts.compress.rank: lists {len(ranks)}, expected one for each of"
                         f" {len(layers)} layers with experts")  # fmt: skip
    for layer, rank in ((layers[at], ranks[at]) for at in places):
        for role in layer.roles:
            name = layer.name(0, role)
            shape = model.shape(name)
            if len(shape) != 2:
                raise MergeError(
                    f"{name}: is no matrix, {list(shape)}; experts with biases cannot be compressed"
                )
            if rank > min(shape):
                raise MergeError(
                    f"experts.compress.rank: {rank}, expected 1 to {min(shape)}:"
                    f" {name} is {list(shape)}"
                )


def saved_bytes(model: Weights, settings: ExpertSettings) -> int:
    """Room on the disk for what a training saves of itself: float32, with two moments, twice."""
    if settings.compress is None or settings.compress.steps == 0:
        return 0
    return 24 * sum(math.prod(model.shape(name)) for name in model.names)


def matrix_names(
    layers: Sequence[ExpertLayer], plans: Sequence[LayerPlan], skip: Sequence[int]
) -> dict[str, str]:
    """The compressed matrix that stands for each expert's tensor, by the tensor's stored name."""
    return {
        layer.name(expert, role): layer.name(slot, role)
        for at, (layer, plan) in enumerate(zip(layers, plans, strict=True))
        if at not in skip
        for expert, slot in enumerate(plan.groups.slots)
        for role in layer.roles
    }


def compress_experts(
    model: Model,
    layers: Sequence[ExpertLayer],
    plans: Sequence[LayerPlan],
    settings: ExpertSettings,
    merged: Computed,
    examples: Sequence[Example],
    saves: AsideSaves,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> CompressedExperts:
    """Every matrix of the merged experts as U V + S, S with a share of its rows.

    `merged` is the merged model under the names of the remapped form. Without steps the rows of S
    that stay are those of the largest mean over batches of |s·∂CE/∂s|. With steps all of U, V, S
    and, as `train` says, the rest but the routers is trained on CE and the divergence from the
    whole model, and rows go by the running mean of their importance; after every step rows below
    the threshold are 0, and may grow again in the next one.

    Memory: the model in float32, once more for a teacher, and U, V, S with two moments each. An
    earlier attempt in `saves` is gone on with, bit for bit. Raises MergeError for data without
    tokens to predict, and for a loss that is not finite.

    Source: Li et al. 2024, arXiv:2310.01334, sec. 3.2, and the authors' code (rows are output
    neurons). That gradients without training are averaged over batches is ours.
    """
    assert settings.compress is not None
    if saves.state is not None and _RESULT in saves.state[1]:
        return _read(*saves.state)
    if not any(len(example.predicted) for example in examples):
        raise MergeError("calibration: no example has a token to predict; give longer ones")
    student = _Student(model, layers, plans, merged, settings, device)
    if settings.compress.steps == 0:
        curve: list[float] = []
        student.choose(batches(examples, settings.batch_size), len(examples), progress)
    else:
        curve = student.train(Network(model, device=device), examples, saves, seed, progress)
    others = {name: tensor.cpu() for name, tensor in student.others.items()}
    found = CompressedExperts(student.matrices(), others, curve)
    _save(found, saves)
    return found


class _Student:
    """The merged model in training: U, V, S of its experts and, if asked for, its other tensors."""

    def __init__(
        self,
        model: Model,
        layers: Sequence[ExpertLayer],
        plans: Sequence[LayerPlan],
        merged: Computed,
        settings: ExpertSettings,
        device: str,
    ) -> None:
        assert settings.compress is not None
        self._settings: CompressSettings = settings.compress
        self._batch_size = settings.batch_size
        self._network = Network(model, device=device)
        self._stands = matrix_names(layers, plans, settings.skip)
        self._u: dict[str, Tensor] = {}
        self._v: dict[str, Tensor] = {}
        self._s: dict[str, Tensor] = {}
        ranks = self._settings.ranks(len(layers))
        of_name = {
            layer.name(expert, role): rank
            for layer, rank in zip(layers, ranks, strict=True)
            for expert in range(layer.experts)
            for role in layer.roles
        }
        for name in dict.fromkeys(self._stands.values()):
            weight = merged.tensor(name).to(device, torch.float32)
            self._u[name], self._v[name], self._s[name] = decomposed(weight, of_name[name])
        self._importance = {name: s.new_zeros(len(s)) for name, s in self._s.items()}
        self._gradients: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        if self._settings.steps and self._settings.train == "all":
            routers = {name for layer in layers for name in layer.router}
            free = set(self._network.learned) - routers - self._stands.keys()
            self.others = {
                name: model.tensor(name).to(device, torch.float32, copy=True)
                for name in self._network.learned
                if name in free
            }

    def matrices(self) -> dict[str, Compressed]:
        """The compressed matrices as they are now."""
        every = ((name, u, self._v[name], self._s[name]) for name, u in self._u.items())
        return {name: Compressed.of(*parts).to(torch.float32, "cpu") for name, *parts in every}

    def choose(self, data: Iterator[Batch], total: int, progress: Progress) -> None:
        """Leave the share of rows whose mean importance over the batches is largest."""
        density = self._settings.density
        if 0 < density < 1:
            self._write()
            done = 0
            with self._network.gradients(self._take, of=self._stands):
                for rows in data:
                    self._pass(rows, None, what="importance of rows")
                    for name, s in self._s.items():
                        self._importance[name] += row_importance(s, self._gradients[name])
                    done += len(rows.tokens)
                    progress("weighing rows", done, total)
        self._prune(density)

    def train(
        self,
        teacher: Network,
        examples: Sequence[Example],
        saves: AsideSaves,
        seed: int,
        progress: Progress,
    ) -> list[float]:
        """All steps that are not done yet; the losses of all."""
        settings = self._settings
        parts = {"u": self._u, "v": self._v, "s": self._s, "other": self.others}

        def step(number: int) -> float:
            rows = endless_batch(examples, number, self._batch_size, seed=seed, name="distil")
            rows = rows.to(self._network.device)
            self._write()
            return self._pass(rows, self._wanted(teacher, rows), what=f"distillation step {number}")

        with self._network.gradients(self._take, of=[*self._stands, *self.others]):
            return distil(
                {f"{kind}.{name}": t for kind, part in parts.items() for name, t in part.items()},
                step,
                saves,
                steps=settings.steps,
                peak=settings.learning_rate,
                warmup=settings.warmup,
                after=self._stepped,
                carried=self._importance,
                progress=partial(progress, "distilling"),
            )

    @torch.no_grad()
    def _wanted(self, teacher: Network, rows: Batch) -> Tensor | None:
        return teacher.logits(rows) if self._settings.teacher else None

    def _pass(self, rows: Batch, wanted: Tensor | None, *, what: str) -> float:
        """Forward and backward; every parameter's `.grad`. Returns the loss."""
        self._gradients = {}
        for other in self.others.values():
            other.grad = torch.zeros_like(other)
        rows = rows.to(self._network.device)
        loss = distillation_loss(
            self._network.logits(rows),
            wanted,
            rows,
            weight=self._settings.teacher,
            temperature=self._settings.temperature,
        )
        value = self._network.backward(loss, rows, what=what)
        for name, s in self._s.items():
            gradient = self._gradients.setdefault(name, torch.zeros_like(s))
            self._u[name].grad = gradient @ self._v[name].T
            self._v[name].grad = self._u[name].T @ gradient
            s.grad = gradient
        return value

    def _take(self, name: str, gradient: Tensor) -> None:
        """∂L/∂W of a group is the sum over the places where it stands."""
        if (matrix := self._stands.get(name)) is not None:
            if matrix in self._gradients:
                self._gradients[matrix] += gradient
            else:
                self._gradients[matrix] = gradient.clone()
        elif (other := self.others.get(name)) is not None:
            other.grad = gradient.clone()

    def _stepped(self, taken: int) -> None:
        """After a step of the optimiser: blend in the importance, and let rows go."""
        for name, s in self._s.items():
            blended(self._importance[name], row_importance(s, self._gradients[name]))
        dense, settled = self._settings.phases
        share = remaining(
            taken,
            steps=self._settings.steps,
            dense=dense,
            settled=settled,
            density=self._settings.density,
        )
        if share < 1:
            self._prune(share)

    def _prune(self, share: float) -> None:
        widths = [s.shape[1] for s in self._s.values()]
        masks = kept_rows(list(self._importance.values()), widths, share)
        for s, mask in zip(self._s.values(), masks, strict=True):
            s[~mask] = 0

    def _write(self) -> None:
        """Make the network what the parameters say."""
        whole = {name: u @ self._v[name] + self._s[name] for name, u in self._u.items()}
        for name, matrix in self._stands.items():
            self._network.write(name, whole[matrix])
        for name, other in self.others.items():
            self._network.write(name, other)


def _save(found: CompressedExperts, saves: AsideSaves) -> None:
    tensors = {f"trained/{name}": tensor for name, tensor in found.trained.items()}
    for name, matrix in found.matrices.items():
        tensors |= matrix.stored(f"matrix/{name}")
    saves.save(tensors, {_RESULT: sorted(found.matrices), "curve": list(found.curve)})


def _read(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> CompressedExperts:
    matrices = {name: Compressed.read(f"matrix/{name}", tensors) for name in notes[_RESULT]}
    trained = {
        name.removeprefix("trained/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("trained/")
    }
    return CompressedExperts(matrices, trained, notes["curve"])
