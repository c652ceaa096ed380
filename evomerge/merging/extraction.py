"""Extract a LoRA adapter from a fine-tuned model: the low-rank part of what it changed of its base.

Takes one weight at a time. Asks transformers, on the meta device, which modules PEFT can adapt;
knows nothing of recipes or of how the model came about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.adapted import Adapted
from evomerge.checkpoints.adapter import PREFIX, Factors
from evomerge.checkpoints.checkpoint import Checkpoint, Progress, is_finite
from evomerge.checkpoints.compare import compare
from evomerge.checkpoints.skeleton import skeleton
from evomerge.errors import CheckpointError, NonFiniteTensor, SpecError
from evomerge.merging.adapters import Kept, document
from evomerge.merging.conversion import places

Model = Checkpoint | Adapted

_CONV1D = "Conv1D"
"""GPT-2's linear layer, whose weight is [in, out]."""
_LINEAR = ("Linear", _CONV1D)
OVERSAMPLING = 16
"""More directions than twice the rank."""
POWER_ITERATIONS = 8
_FULL = 4
"""Weights with a side of at most this many times Ω's width are decomposed in full."""


@dataclass
class Extracted:
    """An adapter, and what became of every tensor that differs from the base's."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    lost: list[Kept] = field(default_factory=list)
    """Tensors left out, with share 0."""

    @property
    def share(self) -> float:
        """Share of the squared norm of all changes of linear weights, and of those left out."""
        changes = [*self.kept, *self.lost]
        total = sum(change.norm**2 for change in changes)
        found = sum(change.share * change.norm**2 for change in changes)
        return found / total if total else 1.0


@dataclass(frozen=True)
class _Module:
    """A module of the live model; `tensors` are its parameters' names in the checkpoint."""

    name: str
    kind: str
    tensors: Mapping[str, str]


def extract(
    base: Model,
    model: Model,
    *,
    rank: int,
    energy: float | None = None,
    only: str | None = None,
    exclude: str | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """The adapter of at most `rank` that brings `base` nearest to `model`.

    Every linear weight that differs gets the best approximation of its difference, of the smallest
    rank that keeps `energy` of its squared norm if that is given. Norms, biases and embeddings that
    differ are saved whole. `only` and `exclude` are regular expressions searched for in tensors'
    names; what they leave out, and what transformers holds in one parameter of several tensors
    (experts), is in `lost`.

    Memory: the adapter, and about three times the largest weight in float32.

    Raises SpecError with every reason why the two are not of one architecture; CheckpointError for
    an architecture that transformers does not know, or models that are equal; NonFiniteTensor.
    """
    if problems := compare(base, {model.path: model}):
        raise SpecError("extract-lora", problems)
    work = _Work(base, model, rank, energy, _chosen(only, exclude))
    report = progress or (lambda fraction: None)
    modules = _modules(base)
    for index, module in enumerate(modules):
        work.add(module)
        report(index / len(modules))
    result = work.finished()
    report(1.0)
    return result


def low_rank(
    difference: Tensor, rank: int, energy: float | None = None
) -> tuple[Tensor, Tensor, float, float]:
    """Factors b [out, r] and a [r, in] of a difference [out, in], the share kept, and the norm.

        D ≈ B A = (U_r √Σ_r)(√Σ_r V_rᵀ),   share = Σᵢ≤r σᵢ² / ‖D‖²

    By a full decomposition where one side is small, else by a randomised one: the range of
    (D Dᵀ)^q D Ω, Ω Gaussian [in, 2·rank + 16], q = 8, orthonormalised at every step. The share is
    what the factors really keep, by either way. In float32; Ω is the same in every call.

    Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    size = 2 * rank + OVERSAMPLING
    if min(difference.shape) <= _FULL * size:
        u, sigma, v = torch.linalg.svd(difference, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        omega = torch.randn(difference.shape[1], size, generator=generator)
        q = torch.linalg.qr(difference @ omega).Q
        for _ in range(POWER_ITERATIONS):
            q = torch.linalg.qr(difference @ torch.linalg.qr(difference.mT @ q).Q).Q
        u, sigma, v = torch.linalg.svd(q.mT @ difference, full_matrices=False)
        u = q @ u
    norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    shares = sigma.double().square().cumsum(0) / norm**2
    r = min(rank, len(sigma))
    if energy is not None:
        r = min(r, 1 + int((shares < energy).sum()))
    root = sigma[:r].sqrt()
    share = min(float(shares[r - 1]), 1.0)
    return u[:, :r] * root, root.unsqueeze(1) * v[:r], share, norm


class _Work:
    """Collects what becomes of every tensor."""

    def __init__(
        self,
        base: Model,
        model: Model,
        rank: int,
        energy: float | None,
        chosen: Callable[[str], bool],
    ) -> None:
        self._base = base
        self._model = model
        self._rank = rank
        self._energy = energy
        self._chosen = chosen
        self._seen: set[str] = set()
        self._factors: list[Factors] = []
        self._saved: list[str] = []
        self._conv1d = False
        self._result = Extracted()

    def add(self, module: _Module) -> None:
        """Take one module's tensors."""
        self._seen |= set(module.tensors.values())
        changed = {part: name for part, name in module.tensors.items() if self._differs(name)}
        if module.kind in _LINEAR:
            self._add_linear(module, changed)
        elif any(map(self._chosen, changed.values())):
            self._result.whole += changed.values()
            self._save(module)
        else:
            self._lose(changed.values())

    def finished(self) -> Extracted:
        """The adapter, once every module has been added."""
        rest = set(self._base.names) - self._seen - set(self._base.non_float_names)
        self._lose(sorted(filter(self._differs, rest)))
        result = self._result
        if not self._factors:
            raise CheckpointError(
                f"{self._model.path}: no linear weight differs from {self._base.path}"
                f"{', of those chosen' if result.lost else ''}; there is no adapter to extract"
            )
        config, factors = document(self._factors, {})
        result.config = config | {
            "base_model_name_or_path": _name(self._base),
            "bias": "all" if any(key.endswith(".bias") for key in result.tensors) else "none",
            "ensure_weight_tying": bool(self._saved and self._base.tied_names),
            "fan_in_fan_out": self._conv1d,
            "lora_dropout": 0.0,
            "modules_to_save": sorted(self._saved) or None,
            "task_type": None,
            "use_dora": False,
        }
        result.tensors |= factors
        return result

    def _add_linear(self, module: _Module, changed: dict[str, str]) -> None:
        weight = changed.pop("weight", None)
        adapted = weight is not None and self._chosen(weight)
        if weight is not None and adapted:
            self._decompose(module, weight)
        elif weight is not None:
            self._lose([weight])
        for part, name in changed.items():
            if not self._chosen(name):
                self._lose([name])
                continue
            layer = ".base_layer" if adapted else ""
            self._result.whole.append(name)
            self._result.tensors[f"{PREFIX}{module.name}{layer}.{part}"] = self._own(name)

    def _decompose(self, module: _Module, name: str) -> None:
        difference = self._difference(name)
        b, a, share, norm = low_rank(
            difference.mT if module.kind == _CONV1D else difference, self._rank, self._energy
        )
        self._conv1d |= module.kind == _CONV1D
        self._factors.append(Factors(module.name, a, b, 1.0))
        self._result.kept.append(Kept(name, b.shape[1], share, norm))

    def _save(self, module: _Module) -> None:
        """Keep a module's tensors whole; of a tied weight PEFT wants a copy under each name."""
        aliases = {name: alias for alias, name in self._base.tied_names.items()}
        self._saved.append(module.name)
        for part, name in module.tensors.items():
            self._result.tensors[f"{PREFIX}{module.name}.{part}"] = self._own(name)
            if name in aliases:
                self._result.tensors[f"{PREFIX}{aliases[name]}"] = self._own(name)

    def _lose(self, names: Iterable[str]) -> None:
        for name in names:
            norm = torch.linalg.vector_norm(self._difference(name), dtype=torch.float64)
            self._result.lost.append(Kept(name, 0, 0.0, float(norm)))

    def _own(self, name: str) -> Tensor:
        return self._model.tensor(name).clone()

    def _differs(self, name: str) -> bool:
        ours, theirs = self._base.tensor(name), self._model.tensor(name)
        return ours.is_floating_point() and not torch.equal(ours.float(), theirs.float())

    def _difference(self, name: str) -> Tensor:
        difference = self._model.tensor(name).float() - self._base.tensor(name).float()
        if not is_finite(difference):
            raise NonFiniteTensor(
                f"{name}: {self._model.path} or {self._base.path} holds NaN or infinity there"
            )
        return difference


def _name(base: Model) -> str:
    """A hub's name, or the whole path of a folder, which PEFT finds from anywhere."""
    return str(base.folder) if Path(base.path).expanduser().is_dir() else base.path


def _chosen(only: str | None, exclude: str | None) -> Callable[[str], bool]:
    def chosen(name: str) -> bool:
        wanted = only is None or re.search(only, name) is not None
        return wanted and (exclude is None or re.search(exclude, name) is None)

    return chosen


def _modules(base: Model) -> list[_Module]:
    """The live model's modules whose parameters are each one tensor of the checkpoint."""
    model = skeleton(base, otherwise="its linear layers cannot be told")
    live = model.state_dict()
    shapes = {name: base.shape(name) for name in base.names}
    parts = {name: found for name, found in places(model, shapes, live).items() if len(found) == 1}
    stored = {
        part.key: name
        for name, (part,) in parts.items()
        if part.is_run and live[part.key].shape == shapes[name]
    }
    found = []
    for name, module in model.named_modules():
        own = [part for part, _ in module.named_parameters(recurse=False)]
        tensors = {part: stored[f"{name}.{part}"] for part in own if f"{name}.{part}" in stored}
        if tensors and len(tensors) == len(own):
            found.append(_Module(name, type(module).__name__, tensors))
    return found
