"""Permutation groups of experts that a checkpoint holds one by one, and of the neurons in each.

Knows neither what routes to them nor what surrounds them.
"""

from __future__ import annotations

from collections.abc import Iterator

from evomerge.merging.structure.permutations.permutation import Group, Stacked
from evomerge.merging.structure.permutations.units import Shapes, blocks, bound, layers


def experts(
    prefix: str,
    reads: tuple[str, ...],
    writes: str,
    routers: tuple[str, ...],
    shapes: Shapes,
    *,
    clusters: int = 1,
) -> Iterator[Group]:
    """Experts with a row in each of the `routers`' tensors; nothing where there are none.

    `prefix` and a number name an expert; `reads` are those of its weights [neurons, width],
    `writes` the one [width, neurons]. Of a router that first chooses among `clusters` of
    neighbours, experts change places inside their cluster.
    """
    every = layers(shapes, prefix)
    size = len(every) // clusters
    for cluster in range(clusters if every else 0):
        start = cluster * size
        name = prefix.rstrip("._") + (f".cluster_{cluster}" if clusters > 1 else "")
        yield from _cluster(
            name, every[start : start + size], start, reads, writes, routers, shapes
        )


def _cluster(
    name: str,
    members: list[str],
    start: int,
    reads: tuple[str, ...],
    writes: str,
    routers: tuple[str, ...],
    shapes: Shapes,
) -> Iterator[Group]:
    index = blocks(len(members), 1, start)
    rows = bound(shapes, index, *((router, 0) for router in routers))
    stacked = tuple(Stacked(tuple(e + weight for e in members)) for weight in (*reads, writes))
    yield Group(name, "experts", len(members), rows + stacked)
    for unit, expert in enumerate(members):
        neurons = blocks(shapes[expert + writes][1])
        places = *((expert + weight, 0) for weight in reads), (expert + writes, 1)
        binds = bound(shapes, neurons, *places)
        yield Group(f"{name}.{unit}.neurons", "neurons", len(neurons), binds, name, unit)
