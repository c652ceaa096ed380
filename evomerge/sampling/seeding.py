"""Seeds derived from a study's seed and a place in the study: no generator is ever carried along.

Knows nothing of samplers.
"""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *place: int | str, bits: int = 256) -> int:
    """A seed of `bits` bits (at most 256) for one place: SHA-256 of the study's seed and the place.

    Distinct places get unrelated seeds, so draws do not depend on what was drawn elsewhere.
    """
    text = "/".join(str(part) for part in (seed, *place))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest, "big") >> (256 - bits)
