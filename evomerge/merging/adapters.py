"""Merge LoRA adapters of one base into one adapter, from their factors alone, and write it.

Never forms a full matrix and never needs the base. Knows nothing of models: a merge of adapters
with any other method is a merge of the models seen through them, then an extraction.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from evomerge.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, Adapter, Factors
from evomerge.checkpoints.checkpoint import is_finite
from evomerge.errors import ExportError, MergeError, NonFiniteTensor, ShapeMismatch
from evomerge.merging.aside import check_free, flush, written_aside

_SMALL_FILES = 1 << 20
"""Room for the config and the header of the weights, in bytes."""


@dataclass(frozen=True)
class Kept:
    """What an adapter keeps of one change: ‖kept‖² as a share of ‖change‖².

    `name` is a tensor's of a model, or a module's of adapters.
    """

    name: str
    rank: int
    share: float
    norm: float
    """Frobenius norm of the whole change."""


def merge_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], list[Kept]]:
    """One adapter whose update is Σᵢ wᵢ sᵢ Bᵢ Aᵢ: its config, its weights, what it keeps.

    Without `rank` exact, of the sum of the ranks; with it, the nearest of at most that rank in
    every module, whatever its singular values: see `truncate`.

    Raises MergeError for adapters that are more than low-rank factors (DoRA, saved modules, biases,
    experts); ShapeMismatch for adapters of bases of different shapes; NonFiniteTensor.
    """
    if len(adapters) != len(weights):
        raise MergeError(f"{len(adapters)} adapters, but {len(weights)} weights")
    for adapter in adapters:
        _refuse(adapter)
    _warn_of_bases(adapters)
    merged, kept = [], []
    for module in sorted({name for adapter in adapters for name in adapter.factors}):
        parts = [
            (w, a.factors[module])
            for w, a in zip(weights, adapters, strict=True)
            if module in a.factors
        ]
        factors = concatenate(module, parts)
        if not (is_finite(factors.a) and is_finite(factors.b)):
            raise NonFiniteTensor(f"{module}: an adapter holds NaN or infinity there; leave it out")
        if rank is not None:
            factors, share, norm = truncate(factors, rank)
            kept.append(Kept(module, factors.rank, share, norm))
        merged.append(factors)
    config, tensors = document(merged, adapters[0].config)
    return config, tensors | _copies(adapters), kept


def concatenate(module: str, parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Factors of a weighted sum of updates, exactly.

        A = [w₁s₁A₁; w₂s₂A₂; ...],  B = [B₁ B₂ ...],  s = 1

    Shapes: a [Σᵢrᵢ, in], b [out, Σᵢrᵢ], float32. Source: peft's combination `cat`.
    """
    shapes = {(f.b.shape[0], f.a.shape[1], f.is_embedding) for _, f in parts}
    if len(shapes) > 1:
        (out, into, _), (other_out, other_into, _), *_ = sorted(shapes)
        raise ShapeMismatch(
            f"{module}: one adapter fits a weight of {[out, into]}, another of"
            f" {[other_out, other_into]}; all adapters must share one base"
        )
    a = torch.cat([f.a.float() * (weight * f.scale) for weight, f in parts])
    b = torch.cat([f.b.float() for _, f in parts], dim=1)
    return Factors(module, a, b, 1.0, is_embedding=parts[0][1].is_embedding)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The nearest update of at most `rank`, the share of ‖s·BA‖² it keeps, and ‖s·BA‖.

        B = Q_b R_b,  Aᵀ = Q_a R_a,  R_b R_aᵀ = U Σ Vᵀ
        B' = Q_b U_r √Σ_r,  A' = √Σ_r (Q_a V_r)ᵀ

    Best in the Frobenius norm (Eckart and Young 1936), in float64; at the cost of two thin QR
    decompositions. An update of zero keeps its share, 1. Shapes: a' [r, in], b' [out, r], float32.
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr((factors.a.double() * factors.scale).mT)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    r = min(rank, len(sigma))
    root = sigma[:r].sqrt()
    a = (root.unsqueeze(1) * (v[:r] @ q_a.mT)).float()
    b = ((q_b @ u[:, :r]) * root).float()
    energy = float(sigma.square().sum())
    share = float(sigma[:r].square().sum()) / energy if energy else 1.0
    return replace(factors, a=a, b=b, scale=1.0), share, energy**0.5


def document(
    modules: Iterable[Factors], like: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's config and weights as PEFT reads them; scale is 1 in every module.

    What does not follow from the factors is as in `like`, a config.
    """
    factors = {f.module: f for f in modules}
    ranks = {module: f.rank for module, f in factors.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    pattern = {module: rank for module, rank in ranks.items() if rank != usual}
    config = {
        **like,
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(factors),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return config, {k: t for f in factors.values() for k, t in _named(f)}


def write_adapter(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter's folder, whole or not at all.

    Raises ExportError if the directory exists and is not empty, or cannot be written.
    """
    check_free(directory)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    needed_bytes = sum(tensor.nbytes for tensor in whole.values()) + _SMALL_FILES
    try:
        with written_aside(directory, "adapter", needed_bytes) as aside:
            weights, settings = aside.folder / ADAPTER_WEIGHTS, aside.folder / ADAPTER_CONFIG
            save_file(whole, weights, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True)
            settings.write_text(text + "\n", encoding="utf-8")
            flush(weights)
            flush(settings)
    except SafetensorError as error:
        raise ExportError(f"{directory}: cannot be written: {error}") from error


def _named(factors: Factors) -> list[tuple[str, Tensor]]:
    stem = f"{PREFIX}{factors.module}"
    if factors.is_embedding:
        return [(f"{stem}.lora_embedding_A", factors.a), (f"{stem}.lora_embedding_B", factors.b)]
    return [(f"{stem}.lora_A.weight", factors.a), (f"{stem}.lora_B.weight", factors.b)]


def _refuse(adapter: Adapter) -> None:
    """Raise for an adapter whose update is not a sum of products."""
    more = [name for name in sorted(adapter.whole) if name not in adapter.copies]
    reason = (
        "uses DoRA, whose updates do not add"
        if adapter.settings.use_dora
        else "adapts experts as one parameter"
        if adapter.settings.target_parameters
        else f"replaces {more[0]} of its base"
        if more
        else None
    )
    if reason:
        raise MergeError(
            f"{adapter.path}: {reason}; merge the models instead (BASE+{adapter.path} as a source"
            " of `evomerge merge`), and extract an adapter from the result"
        )


def _copies(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Embeddings of the base that PEFT saved beside its factors."""
    copies: dict[str, Tensor] = {}
    for adapter in adapters:
        for name in adapter.copies:
            tensor = copies.setdefault(name, adapter.whole[name])
            if not torch.equal(tensor, adapter.whole[name]):
                raise MergeError(
                    f"{name}: {adapter.path} and another adapter hold different base weights there;"
                    " all adapters must share one base"
                )
    return {f"{PREFIX}{n.removesuffix('.weight')}.base_layer.weight": t for n, t in copies.items()}


def _warn_of_bases(adapters: Sequence[Adapter]) -> None:
    bases = {adapter.settings.base for adapter in adapters if adapter.settings.base}
    if len(bases) > 1:
        logging.getLogger(__name__).warning(
            "the adapters were trained on different bases: %s", ", ".join(sorted(bases))
        )
