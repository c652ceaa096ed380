"""Which part of a study an item belongs to, decided by the item's content alone.

Knows nothing of tasks, models or order: an item stays in its part whatever is added around it,
and items that are equal always share a part, so none is searched on and reported on.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from evomerge.errors import TaskError
from evomerge.spec import Split
from evomerge.trial import Part

_HEX_DIGITS = 13  # 52 bits: the quotient below is exact in float64 and under 1


def item_hash(doc: Any) -> str:
    """SHA-256 of an item's canonical JSON, as 64 hexadecimal digits. Key order is irrelevant.

    Raises TaskError for a value that has no content to hash.
    """
    text = json.dumps(
        doc, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_content
    )
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def part_of(hash_: str, split: Split) -> Part:
    """The part of the item with this hash: its first 52 bits as a fraction of 1, cut by `split`."""
    fraction = int(hash_[:_HEX_DIGITS], 16) / 16**_HEX_DIGITS
    if fraction < split.search:
        return "search"
    if fraction < split.search + split.selection:
        return "selection"
    return "report"


def _content(value: Any) -> Any:
    """What stands for a value that JSON has no form for."""
    if isinstance(value, bytes | bytearray):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    for method in ("isoformat", "tolist", "tobytes"):  # dates, arrays, images
        if hasattr(value, method):
            return getattr(value, method)()
    raise TaskError(
        f"an item holds a {type(value).__name__}, which has no canonical form; "
        "items are made of text, numbers, lists, dates and bytes"
    )
