"""DAM in mid-course: coefficients, optimiser, and the losses so far; one step at a time.

Knows no artifact and no clock.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.errors import MergeError, UserError
from evomerge.merging.fitted import dam_losses as losses
from evomerge.merging.fitted.base import Problem, Watch, learned_names
from evomerge.merging.fitted.calibration import batch
from evomerge.merging.fitted.granularity import grid_of, kind_of
from evomerge.merging.fitted.mergers import Mergers
from evomerge.merging.fitted.mofo import AdamW
from evomerge.merging.fitted.network import Network
from evomerge.merging.fitted.teacher import Cache, Live, Teachers, counting
from evomerge.merging.layout import layer_of
from evomerge.merging.methods.mergers import inverse

if TYPE_CHECKING:
    from evomerge.merging.fitted.dam import DamSettings

_CURVE_POINTS = 1000


class Training:
    """`step` of `steps` are done; `mergers` holds the coefficients that they led to.

    The network's weights are the merge's when a step begins its forward passes; a live teacher
    writes the sources' over them, one after the other, and the merge is written anew.
    """

    def __init__(
        self, network: Network, problem: Problem, settings: DamSettings, watch: Watch
    ) -> None:
        counts = [len(problem.calibration.of(name)) for name in problem.sources]
        epoch = math.ceil(max(counts) / settings.batch_size)
        self.step, self.steps = 0, settings.steps or settings.epochs * epoch
        self.mergers = make_mergers(network, problem, settings)
        self._network, self._problem, self._settings = network, problem, settings
        self._optimizer = AdamW(
            self.mergers.m,
            rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            alpha=settings.alpha if settings.optimizer == "mofo" else None,
        )
        self._angles = _angles(self.mergers, network) if settings.weighted_overlap else {}
        self._teachers = _teachers(network, problem, settings, watch)
        # what a step must write: a live teacher leaves the sources' weights behind
        self._stale = None if settings.teacher == "live" else self.mergers.grids
        self._rows: list[dict[str, float]] = []
        self.mergers.write(network)

    def advance(self) -> None:
        """One step: teachers, merged weights, a backward pass for each source, the optimiser."""
        drawn = {name: self._draw(name) for name in self._problem.sources}
        teachers: Mapping[str, losses.Teacher] = {}
        if self._settings.kl or self._settings.mse:
            teachers = self._teachers.of(drawn)
        self.mergers.write(self._network, self._stale if teachers else self.mergers.grids)
        terms: dict[str, float] = {}
        total = 0.0
        with self._network.gradients(self.mergers.take):
            for name, numbers in drawn.items():
                total += self._backward(name, numbers, teachers.get(name), terms)
        gradients = self.mergers.gradients()
        total += self._regularise(gradients, terms)
        self._clip(gradients)
        self._optimizer.step(gradients)
        self._rows.append({"loss": total, **terms})
        self.step += 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `restore` goes on from."""
        m = {f"m/{key}": value for key, value in self.mergers.m.items()}
        return m | self._optimizer.state(), {"step": self.step, "rows": self._rows}

    def restore(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Go on where an earlier attempt was."""
        for key, m in self.mergers.m.items():
            m.copy_(tensors[f"m/{key}"])
        self.step, self._rows = notes["step"], list(notes["rows"])
        self._optimizer.restore(tensors, self.step)

    def tensors(self) -> dict[str, Tensor]:
        """m of every trained tensor, [s, g]."""
        return {name: self.mergers.m[key].clone() for name, key in self.mergers.keys.items()}

    def facts(self) -> dict[str, Any]:
        """What the artifact says beside them."""
        every = math.ceil(len(self._rows) / _CURVE_POINTS)
        pieces = [self._rows[at : at + every] for at in range(0, len(self._rows), every)]
        curve = {
            term: [sum(row[term] for row in piece) / len(piece) for piece in pieces]
            for term in self._rows[0]
        }
        return {
            "anchor": self._settings.anchor,
            "non_linearity": self._settings.non_linearity,
            "granularity": self._settings.granularity,
            "axes": {name: grid.axis for name, grid in self.mergers.grids.items()},
            "averaged": list(self.mergers.averaged),
            "steps": self.steps,
            "curve": {"every": every, "terms": curve},
        }

    def _draw(self, name: str) -> list[int]:
        """The numbers of a source's examples for this step: endless shuffled passes over them."""
        count, size = len(self._problem.calibration.of(name)), self._settings.batch_size
        places = range(self.step * size, (self.step + 1) * size)
        return [_order(count, self._problem.seed, at // count)[at % count] for at in places]

    def _backward(
        self,
        name: str,
        numbers: Sequence[int],
        teacher: losses.Teacher | None,
        terms: dict[str, float],
    ) -> float:
        """Take the gradients of one source's losses; their weighted sum."""
        examples, settings = self._problem.calibration.of(name), self._settings
        rows = batch([examples[number] for number in numbers])
        logits = self._network.logits(rows)
        logits = logits[counting(rows, settings.tokens).to(logits.device)]
        found: dict[str, tuple[float, Tensor]] = {}
        if teacher is not None and settings.kl:
            found["kl"] = settings.kl, losses.kl(logits, teacher, settings.temperature)
        if teacher is not None and settings.mse:
            found["mse"] = settings.mse, losses.mse(logits, teacher)
        if settings.entropy:
            found["entropy"] = settings.entropy, losses.entropy(logits, settings.temperature)
        terms.update(
            {f"{term}/{name}": float(value.detach()) for term, (_, value) in found.items()}
        )
        total = torch.stack([weight * value for weight, value in found.values()]).sum()
        return self._network.backward(total, rows, what=f"dam, step {self.step + 1}, {name}")

    def _regularise(self, gradients: Mapping[str, Tensor], terms: dict[str, float]) -> float:
        """Add the gradients of the losses among coefficients; their weighted sum."""
        settings = self._settings
        leaves = {key: m.clone().requires_grad_() for key, m in self.mergers.m.items()}
        kinds = {
            "similarity": (settings.similarity, losses.similarity),
            "l1": (settings.l1, losses.l1),
            "l2": (settings.l2, losses.l2),
            "overlap": (settings.overlap, losses.overlap),
        }
        found = {
            term: (weight, torch.stack([loss(m) for m in leaves.values()]).sum())
            for term, (weight, loss) in kinds.items()
            if weight
        }
        if settings.weighted_overlap:
            values = [losses.overlap(leaves[key], at) for key, at in self._angles.items()]
            found["weighted_overlap"] = settings.weighted_overlap, torch.stack(values).sum()
        terms.update({term: float(value.detach()) for term, (_, value) in found.items()})
        if not found:
            return 0.0
        total = torch.stack([weight * value for weight, value in found.values()]).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        for key, leaf in leaves.items():
            if leaf.grad is not None:
                gradients[key].add_(leaf.grad)
        return float(total.detach())

    def _clip(self, gradients: Mapping[str, Tensor]) -> None:
        """Shorten all gradients together to `max_grad_norm`, as torch's clip_grad_norm_ does."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.values()]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not math.isfinite(norm):
            raise MergeError(
                f"dam, step {self.step + 1}: the gradient is {norm:g}; lower the learning rate,"
                " or look for NaN in what the sources compute"
            )
        if self._settings.max_grad_norm is not None:
            factor = min(1.0, self._settings.max_grad_norm / (norm + 1e-6))
            for gradient in gradients.values():
                gradient.mul_(factor)


def make_mergers(network: Network, problem: Problem, settings: DamSettings) -> Mergers:
    """Coefficients of everything that is trained, each source's φ(m) = 1/N to begin with.

    With `initial: random`, φ(m) is a softmax over sources of numbers drawn for each module.
    """
    names = [
        name for name in learned_names(problem, network) if kind_of(network, name) in settings.train
    ]
    if not names:
        raise UserError(f"dam: the model has no {' or '.join(settings.train)} to train")
    grids = {name: grid_of(network, name, settings.granularity) for name in names}
    by_layer = settings.granularity == "layer"
    keys = {
        name: f"layer {layer}" if by_layer and (layer := layer_of(name)) is not None else name
        for name in names
    }
    initial: dict[str, Tensor] = {}
    for name, key in keys.items():
        shares = _shares(len(problem.sources), key, problem.seed, settings)
        m = [inverse(settings.non_linearity, share) for share in shares]
        initial[key] = torch.tensor(m)[:, None].repeat(1, grids[name].groups)
    return Mergers(
        problem,
        grids,
        keys,
        initial,
        non_linearity=settings.non_linearity,
        around_base=settings.anchor == "base",
    )


def _shares(count: int, key: str, seed: int, settings: DamSettings) -> list[float]:
    if settings.initial == "uniform":
        return [1 / count] * count
    number = hashlib.sha256(f"{seed} {key}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(number, "big") >> 1)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).softmax(0)
    return [float(share) for share in drawn]


def _angles(mergers: Mergers, network: Network) -> dict[str, Tensor]:
    """sin²(2θ) of the columns of task vectors, [s, s, g] by key; of linear layers only."""
    products: dict[str, Tensor] = {}
    for name, key in mergers.keys.items():
        if kind_of(network, name) == "linears":
            found = mergers.products(name)
            products[key] = products[key] + found if key in products else found
    if not products:
        raise UserError("dam: `weighted_overlap` is of linear layers; `train` has none")
    return {key: losses.angle_weights(found) for key, found in products.items()}


def _teachers(network: Network, problem: Problem, settings: DamSettings, watch: Watch) -> Teachers:
    if settings.teacher == "live":
        return Live(network, problem, settings.tokens)
    cache = Cache(
        network,
        problem,
        top_k=settings.top_k,
        temperature=settings.temperature,
        tail=settings.tail,
        tokens=settings.tokens,
        batch_size=settings.batch_size,
        watch=watch,
    )
    return cache.kept(settings.cache)


@lru_cache(maxsize=64)
def _order(count: int, seed: int, passes: int) -> tuple[int, ...]:
    """The order of a pass over that many examples; the same for every source of that many."""
    number = hashlib.sha256(f"{seed} {passes}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(number, "big") >> 1)
    return tuple(torch.randperm(count, generator=generator).tolist())
