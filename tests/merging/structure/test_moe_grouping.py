"""Which experts become one: the published rules, their ties, and what must not depend on order."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.structure.experts.alignment import matched, permuted
from evomerge.merging.structure.experts.grouping import (
    Groups,
    adaptive_counts,
    by_clusters,
    by_dominants,
    check_counts,
    cosine,
    distances,
)
from evomerge.merging.structure.experts.plan import group_weights
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.experts.size import compressed_parameters, moe_parameters

SWITCH = 2 * 768 * 3072


def _usage(layers: int, experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(layers, experts, generator=generator, dtype=torch.float64) ** 3
    return raw / raw.sum(1, keepdim=True)


def _vectors(experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, 12, generator=generator, dtype=torch.float64)


def test_counts_by_hand() -> None:
    """Of 0.5 0.3 0.2 0 and 0.4 0.35 0.15 0.1 two each: four of 1, 1, 0.35, 0.3."""
    usage = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.4, 0.35, 0.15, 0.1]])
    assert adaptive_counts(usage, 2) == (2, 2)
    assert adaptive_counts(usage, 3) == (3, 3)
    assert adaptive_counts(usage, 1) == (1, 1)


@pytest.mark.parametrize("keep", range(1, 9))
def test_counts_sum_to_what_was_asked_for(keep: int) -> None:
    counts = adaptive_counts(_usage(5, 8), keep)
    assert sum(counts) == 5 * keep
    assert min(counts) >= 1


def test_a_layer_that_is_not_merged_keeps_all_and_costs_the_others_nothing() -> None:
    usage = _usage(4, 8)
    counts = adaptive_counts(usage, 3, unmerged=[1])
    assert counts[1] == 8
    assert sum(counts) == 8 + 3 * 3
    rest = adaptive_counts(usage[[0, 2, 3]], 3)
    assert counts[:1] + counts[2:] == rest


def test_equals_at_the_threshold_are_all_left_out() -> None:
    usage = torch.full((2, 4), 0.25)
    assert adaptive_counts(usage, 2) == (1, 1)
    assert adaptive_counts(usage, 4) == (4, 4)


def test_the_most_used_lead_and_the_others_follow_the_likeliest() -> None:
    usage, vectors = _usage(1, 8)[0], _vectors(8)
    groups = by_dominants(usage, vectors @ vectors.T, 3)
    leaders = set(usage.argsort(descending=True)[:3].tolist())
    assert set(groups.leaders) == leaders
    for expert, leader in enumerate(groups.leaders):
        likeness = {j: torch.cosine_similarity(vectors[expert], vectors[j], 0) for j in leaders}
        best = max(likeness, key=lambda j: likeness[j])
        assert leader == (expert if expert in leaders else best)


def test_a_leader_leads_itself_though_another_is_its_copy() -> None:
    vectors = torch.ones(4, 3, dtype=torch.float64)
    groups = by_dominants(torch.tensor([0.1, 0.2, 0.3, 0.4]), vectors @ vectors.T, 2)
    assert groups.leaders == (2, 2, 2, 3)


@pytest.mark.parametrize("make", [by_dominants, by_clusters])
@pytest.mark.parametrize("keep", [1, 3, 8])
def test_every_expert_is_in_one_group(make: object, keep: int) -> None:
    vectors = _vectors(8)
    groups: Groups = make(_usage(1, 8)[0], vectors @ vectors.T, keep)  # type: ignore[operator]
    assert len(groups.members) == keep
    assert sorted(itertools.chain(*groups.members)) == list(range(8))
    assert all(groups.leaders[leader] == leader for leader in groups.leaders)
    assert all(e in groups.members[slot] for e, slot in enumerate(groups.slots))
    assert [m[0] for m in groups.members] == sorted(m[0] for m in groups.members)


@pytest.mark.parametrize("make", [by_dominants, by_clusters])
def test_relabelled_experts_are_grouped_alike(make: object) -> None:
    usage, vectors = _usage(1, 8, 3)[0], _vectors(8, 3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    one: Groups = make(usage, vectors @ vectors.T, 3)  # type: ignore[operator]
    moved = vectors[order]
    other: Groups = make(usage[order], moved @ moved.T, 3)  # type: ignore[operator]
    assert {frozenset(m) for m in one.members} == {
        frozenset(order[list(m)].tolist()) for m in other.members
    }


@pytest.mark.parametrize("keep", [2, 4])
def test_clusters_are_scipys_by_coordinates(keep: int) -> None:
    vectors = _vectors(8, 5)
    groups = by_clusters(_usage(1, 8)[0], vectors @ vectors.T, keep)
    labels = fcluster(linkage(vectors.numpy(), "average"), keep, "maxclust")
    expected = {frozenset((labels == label).nonzero()[0].tolist()) for label in set(labels)}
    assert {frozenset(m) for m in groups.members} == expected


def test_cosine_and_distance_of_a_vector_of_zeros() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    assert cosine(vectors @ vectors.T).tolist() == [[0, 0], [0, 1]]
    assert distances(vectors @ vectors.T).tolist() == [[0, 5], [5, 0]]


def test_weights_sum_to_one_in_every_group_even_if_unused() -> None:
    usage = torch.tensor([0.6, 0.3, 0.1, 0.0, 0.0])
    groups = Groups((0, 0, 2, 3, 3))
    assert group_weights(usage, groups, ExpertSettings(keep=3)) == pytest.approx(
        (2 / 3, 1 / 3, 1.0, 0.5, 0.5)
    )
    alike = group_weights(usage, groups, ExpertSettings(keep=3, exponent=0.0))
    assert alike == (0.5, 0.5, 1.0, 0.5, 0.5)
    assert group_weights(usage, groups, ExpertSettings(keep=3, method="prune")) == (1, 0, 1, 1, 0)


def test_a_planted_order_of_neurons_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1, "bias": None}
    expert = {
        "gate_proj.weight": torch.randn(9, 6, generator=generator),
        "up_proj.weight": torch.randn(9, 6, generator=generator),
        "down_proj.weight": torch.randn(6, 9, generator=generator),
        "bias": torch.randn(6, generator=generator),
    }
    order = torch.randperm(9, generator=generator)
    copy = {role: permuted(tensor, order, axes[role]) for role, tensor in expert.items()}
    found = matched(expert, copy, axes)
    for role, tensor in copy.items():
        assert torch.equal(permuted(tensor, found, axes[role]), expert[role])
    assert matched(expert, expert, axes).tolist() == list(range(9))


def test_sizes_are_the_papers() -> None:
    """switch-base-32: 733M, 381M, 570M and 2.0B; its first layer of experts is left whole."""
    shared = 166_800_000
    small = compressed_parameters([(768, 3072), (3072, 768)], rank=32, density=0.1)
    compressed = [SWITCH] + [small] * 11
    sizes = {
        "full": moe_parameters(shared, SWITCH, [32] * 12),
        "M-SMoE": moe_parameters(shared, SWITCH, [32] + [8] * 11),
        "MC-SMoE": moe_parameters(shared, SWITCH, [32] + [8] * 11, compressed),
        "C-SMoE": moe_parameters(shared, SWITCH, [32] * 12, compressed),
    }
    millions = {name: round(size / 1e6) for name, size in sizes.items()}
    assert millions == {"full": 1979, "M-SMoE": 733, "MC-SMoE": 381, "C-SMoE": 570}


def test_counts_that_do_not_fit_are_refused() -> None:
    check_counts([2, 4], 4, 2, least=2)
    with pytest.raises(MergeError, match="1 counts for 2 layers"):
        check_counts([2], 4, 2)
    with pytest.raises(MergeError, match=r"1 in expert layer 1, expected 2 to 4 \(each token"):
        check_counts([2, 1], 4, 2, least=2)
    with pytest.raises(MergeError, match="5 in expert layer 0"):
        check_counts([5, 1], 4, 2)
