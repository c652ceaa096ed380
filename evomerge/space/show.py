"""The genome as rows to print, before any model is loaded.

Knows nothing of terminals: rows are plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.space.space import Space

PLACEHOLDERS = ("source_1", "source_2")


def show(space: Space, sources: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row for each gene; two placeholder sources stand in where none are named.

    Keys: index, name, low, high, init, scale, values (None where continuous), does.
    """
    return [
        {
            "index": index,
            "name": gene.name,
            "low": gene.low,
            "high": gene.high,
            "init": gene.words[int(gene.init)] if gene.words else gene.init,
            "scale": gene.scale,
            "values": list(gene.shown) or None,
            "does": gene.does,
        }
        for index, gene in enumerate(space.genes(list(sources or PLACEHOLDERS)))
    ]
