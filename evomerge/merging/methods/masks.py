"""Counter-based random masks: element j's draw depends on the key and j, and on nothing else.

So a mask is the same for any cutting into blocks, thread count or device, and the masks of one key
are nested: what a drop rate keeps, every lower rate keeps too. Knows nothing of task vectors.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

DRAW_BITS = 32
_WORD = 1 << 64


def mask_key(seed: int, source: str, tensor: str) -> int:
    """A 64-bit key (signed, as torch holds it) for the draws of one source's tensor."""
    # lengths first: ("a", "bc") and ("ab", "c") must not share a key
    text = f"{seed}:{len(source)}:{source}:{tensor}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def draws(key: int, start: int, count: int, *, device: torch.device | None = None) -> Tensor:
    """Uniform integers in [0, 2³²) for the elements start, ..., start + count − 1.

        x_m = mix(key + (m + 1)·0x9E3779B97F4A7C15 mod 2⁶⁴)
        draw_2m = x_m mod 2³²,   draw_2m+1 = x_m >> 32

    Shapes: returns [count] int64. `mix` is the finaliser of SplitMix64 (Steele et al. 2014,
    variant 13 of Stafford's): the draws are the halves of the generator's outputs of index m, low
    one first, computed independently of each other.
    """
    first, end = start >> 1, (start + count + 1) >> 1
    x = torch.arange(first + 1, end + 1, dtype=torch.int64, device=device)
    x.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    x.bitwise_xor_(_shifted(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shifted(x, 27)).mul_(_signed(0x94D049BB133111EB))
    x.bitwise_xor_(_shifted(x, 31))
    halves = torch.stack([x & ((1 << DRAW_BITS) - 1), _shifted(x, DRAW_BITS)], dim=1).view(-1)
    return halves[start & 1 :][:count]


def kept(
    key: int, start: int, count: int, *, density: float, device: torch.device | None = None
) -> Tensor:
    """Which elements survive a drop rate p = 1 − density: those with u = draw/2³² ≥ p.

    Shapes: returns [count] bool. Density 1 keeps all, 0 none.
    """
    return draws(key, start, count, device=device) >= threshold(density)


def threshold(density: float) -> int:
    """The least draw that survives a drop rate of 1 − density, in [0, 2³²]."""
    return math.ceil((1.0 - density) * (1 << DRAW_BITS))


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD >> 1 else word


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's own repeats the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
