"""What each group of units is worth kept apart: how well a merge does with it and without it.

Runs every merge on data, without least squares. Knows no budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from evomerge.errors import MergeError
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.pleas.live import Batches, widened_network
from evomerge.merging.structure.pleas.model import Pair, PleasModel, Refitting

Scored = Callable[[Mapping[str, float], float], object]
"""Told all scores so far, and the FLOPs that they took."""


@torch.no_grad()
def worth(
    pair: Pair, data: Batches, scores: Mapping[str, float], *, device: str, scored: Scored
) -> dict[str, Any]:
    """Minus the mean loss of a token, with all units `merged`, all `separate`, and with each group
    treated the other way. `scores` are those that an earlier attempt has found."""
    sizes = {group.name: group.size for group in pair.widening.groups}
    found, flops = dict(scores), 0.0
    for what, apart in tried(sizes).items():
        if what not in found:
            network = widened_network(
                PleasModel(pair, apart, Refitting(form="none")), device=device
            )
            found[what] = _score(network, data, what)
            flops += network.flops
            scored(found, flops)
    return {
        "merged": found["merged"],
        "separate": found["separate"],
        "merged_except": {name: found[f"merged but {name}"] for name in sizes},
        "separate_except": {name: found[f"separate but {name}"] for name in sizes},
    }


def tried(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The units that stay apart in every merge that is scored, by what is said of it."""
    none = dict.fromkeys(sizes, 0)
    found = {"merged": none, "separate": dict(sizes)}
    for name, size in sizes.items():
        found[f"merged but {name}"] = {**none, name: size}
        found[f"separate but {name}"] = {**sizes, name: 0}
    return found


def _score(network: Network, data: Batches, what: str) -> float:
    """Minus the mean loss for each token that counts."""
    total, count = 0.0, 0
    for part in data:
        logits = network.logits(part).cpu()
        counted = logits[part.counted].double()
        total += float(cross_entropy(counted, part.targets[part.counted], reduction="sum"))
        count += len(counted)
    if not total < float("inf"):
        raise MergeError(f"the merge with units {what}: its loss on the calibration data is NaN or"
                         " infinite; look for such numbers in the models")  # fmt: skip
    return -total / count
