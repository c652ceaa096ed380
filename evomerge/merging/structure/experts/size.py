"""How large a model is after its experts were merged and compressed. Counts only."""

from __future__ import annotations

from collections.abc import Sequence


def moe_parameters(
    shared: int, expert: int, experts_kept: Sequence[int], compressed: Sequence[int | float] = ()
) -> float:
    """Parameters of a model whose layer t keeps `experts_kept[t]` experts.

        N = shared + Σₜ Kₜ·sₜ

    `shared` are all parameters outside of the experts, `expert` those of one expert, which is sₜ
    unless `compressed` gives another for every layer.

    Source: derived from Li et al. 2024, arXiv:2310.01334, table 2 (733M, 381M and 570M).
    """
    sizes = compressed or [expert] * len(experts_kept)
    return shared + sum(count * size for count, size in zip(experts_kept, sizes, strict=True))


def compressed_parameters(shapes: Sequence[tuple[int, int]], *, rank: int, density: float) -> float:
    """Parameters of an expert of which each matrix [m, n] is U V + S, S with a share of its rows.

    s = Σ (m + n)·rank + density·m·n
    """
    return sum((m + n) * rank + density * m * n for m, n in shapes)
