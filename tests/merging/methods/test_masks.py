"""Counter-based draws: known answers, independence of the cutting, statistics."""

from __future__ import annotations

import itertools

import torch

from evomerge.merging.methods.masks import draws, kept, mask_key

WORD = 2**64


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, sequentially, in Python integers."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % WORD
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
        outputs.append(z ^ (z >> 31))
    return outputs


def test_draws_are_the_generators_outputs() -> None:
    for key in (0, 1234567, -5, 2**63 - 1, -(2**63)):
        words = splitmix64(key % WORD, 25)
        expected = [half for word in words for half in (word % 2**32, word >> 32)]
        assert draws(key, 0, 50).tolist() == expected


def test_published_first_output_of_seed_1234567() -> None:
    assert splitmix64(1234567, 1) == [6457827717110365317]
    assert draws(1234567, 1, 1).tolist() == [6457827717110365317 >> 32]


def test_a_part_is_the_part_of_the_whole() -> None:
    whole = draws(99, 0, 1000)
    assert torch.equal(draws(99, 317, 400), whole[317:717])
    assert draws(99, 2**40, 3).tolist() == draws(99, 2**40 - 1, 4)[1:].tolist()


def test_keys_tell_seed_source_and_tensor_apart() -> None:
    keys = {
        mask_key(0, "a", "bc"),
        mask_key(0, "ab", "c"),
        mask_key(1, "a", "bc"),
        mask_key(0, "a", "bd"),
        mask_key(10, "", "abc"),
        mask_key(1, "0", "abc"),
    }
    assert len(keys) == 6
    assert mask_key(3, "math", "w") == mask_key(3, "math", "w")


def test_masks_are_nested_in_density() -> None:
    masks = [kept(7, 0, 4000, density=d) for d in (0.0, 0.01, 0.3, 0.31, 0.9, 1.0)]
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer & ~more).any()
    assert not masks[0].any()
    assert masks[-1].all()


def test_the_kept_share_is_the_density() -> None:
    count = 200_000
    for key, density in ((1, 0.1), (2, 0.5), (3, 0.97)):
        share = kept(key, 0, count, density=density).double().mean().item()
        assert abs(share - density) < 4 * (density * (1 - density) / count) ** 0.5


def test_draws_of_neighbours_and_of_two_keys_are_uncorrelated() -> None:
    count = 100_000
    first, second = (draws(mask_key(0, name, "w"), 0, count).double() for name in "ab")
    pairs = torch.stack([first[1:], first[:-1], second[1:]])
    correlations = torch.corrcoef(pairs)
    off_diagonal = correlations[~torch.eye(3, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 4 / count**0.5
