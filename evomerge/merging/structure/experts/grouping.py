"""Which experts of a layer become one: dominant experts and their followers, or clusters.

Works on usage and on inner products of whatever the experts are compared by. Knows neither weights
nor data.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from evomerge.errors import MergeError


@dataclass(frozen=True)
class Groups:
    """A partition of E experts: `leaders[i]` is the expert that stands for expert i's group.

    A leader stands for itself.
    """

    leaders: tuple[int, ...]

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The experts of every group, groups in the order of their lowest expert."""
        found: dict[int, list[int]] = {}
        for expert, leader in enumerate(self.leaders):
            found.setdefault(leader, []).append(expert)
        return tuple(tuple(group) for group in found.values())

    @property
    def slots(self) -> tuple[int, ...]:
        """For every expert the place of its group in `members`."""
        places = {expert: k for k, group in enumerate(self.members) for expert in group}
        return tuple(places[expert] for expert in range(len(self.leaders)))


def adaptive_counts(usage: Tensor, keep: int, *, unmerged: Collection[int] = ()) -> tuple[int, ...]:
    """How many experts each layer keeps, `keep` of a merged layer on average.

        f̃ₜ = usage of layer t, its largest set to 1; all ones for an unmerged layer
        θ  = the (T+1)-th largest of all f̃, T = keep·|merged| + E·|unmerged|
        Kₜ = #{f̃ₜ > θ}

    Shapes: usage [l, E], each row of sum 1. The inequality is strict: where the T-th and the
    (T+1)-th are equal (unused experts, say) fewer than T are kept, never more. Kₜ ≥ 1.

    Source: Li et al. 2024, arXiv:2310.01334, algorithm 1, and the authors' code.
    """
    layers, experts = usage.shape
    raised = usage.to(torch.float64).clone()
    raised[torch.arange(layers), raised.argmax(1)] = 1.0
    raised[sorted(unmerged)] = 1.0
    merged = layers - len(set(unmerged))
    total = keep * merged + experts * (layers - merged)
    if total >= raised.numel():
        return (experts,) * layers
    threshold = raised.flatten().sort(descending=True).values[total]
    return tuple((raised > threshold).sum(1).tolist())


def by_dominants(usage: Tensor, gram: Tensor, keep: int) -> Groups:
    """The `keep` most used experts lead; every other one follows the leader most like it.

        Q(i) = argmax over leaders j of ⟨vᵢ, vⱼ⟩ / (‖vᵢ‖‖vⱼ‖)

    Shapes: usage [E]; gram [E, E] of inner products ⟨vᵢ, vⱼ⟩. Of equals the lowest index is taken.
    A vector of zeros is like no other (cosine 0).

    Source: Li et al. 2024, arXiv:2310.01334, sec. 3.1, with v the router's logits over tokens.
    Unlike the authors' code for uniform counts, leaders are told by usage, never by index.
    """
    leaders = sorted(most_used(usage, keep))
    likeness = cosine(gram)[:, leaders]
    chosen = [leaders[at] for at in likeness.argmax(1).tolist()]
    for leader in leaders:
        chosen[leader] = leader
    return Groups(tuple(chosen))


def by_clusters(usage: Tensor, gram: Tensor, keep: int) -> Groups:
    """Agglomerative clusters by Euclidean distance and average linkage; the most used one leads.

    Shapes: usage [E]; gram [E, E] of inner products of what experts are compared by.

    Source: Chen et al. 2025, HC-SMoE, arXiv:2410.08589, with every expert's mean output.
    """
    experts = len(usage)
    if keep >= experts:
        return Groups(tuple(range(experts)))
    tree = linkage(squareform(distances(gram).numpy(), checks=False), "average")
    labels = cut_tree(tree, n_clusters=keep).reshape(-1)
    leaders = np.empty(experts, dtype=int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        leaders[members] = members[int(usage[members].argmax())]
    return Groups(tuple(leaders.tolist()))


def most_used(usage: Tensor, keep: int) -> list[int]:
    """The experts of largest usage [E], the lowest index first among equals."""
    order: list[int] = usage.argsort(descending=True, stable=True).tolist()
    return order[:keep]


def cosine(gram: Tensor) -> Tensor:
    """Cosines [E, E] from inner products; 0 for a vector of zeros."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    products = lengths[:, None] * lengths
    return torch.where(products > 0, gram / products, torch.zeros_like(gram))


def distances(gram: Tensor) -> Tensor:
    """Euclidean distances [E, E] from inner products, the diagonal exactly 0."""
    squares = gram.diagonal()
    between = (squares[:, None] + squares - (gram + gram.T)).clamp(min=0).sqrt()
    return between.fill_diagonal_(0.0)


def check_counts(counts: Sequence[int], experts: int, layers: int, *, least: int = 1) -> None:
    """Raise MergeError for counts that are not one for each layer, from `least` to `experts`."""
    if len(counts) != layers:
        raise MergeError(f"experts.keep: {len(counts)} counts for {layers} layers with experts")
    for number, count in enumerate(counts):
        if not least <= count <= experts:
            raise MergeError(
                f"experts.keep: {count} in expert layer {number}, expected {least} to {experts}"
                + (" (each token is sent to that many)" if least > 1 and count < least else "")
            )
