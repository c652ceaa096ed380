"""What `evomerge diff --json` prints: differences as plain data, with stable keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.distance import Distance, Interference
from evomerge.merging.difference import ABSENT, Difference, Group
from evomerge.merging.recipe import Recipe
from evomerge.merging.recipe_difference import RecipeDifference


def models_json(found: Difference) -> dict[str, Any]:
    """How two models differ. A config key that one side lacks has no entry for that side."""
    said = found.statements
    return {
        "compared": "models",
        "identical": found.identical,
        "config": [{"key": key, **_sides(pair)} for key, pair in said.config.items()],
        "files": [{"name": name, "difference": what} for name, what in said.files.items()],
        "tokens": {
            "only_a": list(said.tokens_only_a),
            "only_b": list(said.tokens_only_b),
            "ids": [{"token": token, **_sides(pair)} for token, pair in said.token_ids.items()],
        },
        "only_a": list(said.only_a),
        "only_b": list(said.only_b),
        "shapes": [{"name": n, "a": list(a), "b": list(b)} for n, (a, b) in said.shapes.items()],
        "dtypes": [{"name": name, **_sides(pair)} for name, pair in said.dtypes.items()],
        "total": _group(found.total()),
        "types": [_group(group) for group in found.by_type()],
        "groups": [_group(group) for group in found.by_type_and_layer()],
        "tensors": [
            {
                "name": tensor.place.name,
                "type": tensor.place.type,
                "layer": tensor.place.layer,
                **_figures(tensor.distance, tensor.interference),
            }
            for tensor in found.tensors
        ],
    }


def recipes_json(a: Recipe, b: Recipe, found: RecipeDifference) -> dict[str, Any]:
    """How two recipes differ."""
    return {
        "compared": "recipes",
        "identical": found.identical,
        "digests": {"a": a.digest, "b": b.digest},
        "settings": [{"key": key, **_sides(pair)} for key, pair in found.settings.items()],
        "sources": {"only_a": list(found.only_a), "only_b": list(found.only_b)},
        "parameters": [
            {
                "source": parameter.source,
                "parameter": parameter.parameter,
                "a": parameter.a,
                "b": parameter.b,
                "cells": [
                    {"type": c.type, "layer": c.layer, "a": list(c.a), "b": list(c.b)}
                    for c in parameter.cells
                ],
            }
            for parameter in found.parameters
        ],
    }


def _sides(pair: tuple[Any, Any]) -> Mapping[str, Any]:
    return {side: value for side, value in zip("ab", pair, strict=True) if value is not ABSENT}


def _group(group: Group) -> dict[str, Any]:
    return {
        "type": group.type,
        "layer": group.layer,
        "tensors": group.tensors,
        **_figures(group.distance, group.interference),
    }


def _figures(distance: Distance, interference: Interference | None) -> dict[str, Any]:
    return {
        "entries": distance.entries,
        "changed": distance.changed,
        "changed_share": distance.changed_share,
        "relative_norm": distance.relative_norm,
        "cosine": distance.cosine,
        "max": distance.largest,
        "non_finite": {"a": distance.non_finite_a, "b": distance.non_finite_b},
        "task_vectors": None if interference is None else _task_vectors(interference),
    }


def _task_vectors(found: Interference) -> dict[str, Any]:
    norm_a, norm_b = found.relative_norms
    return {
        "relative_norm": {"a": norm_a, "b": norm_b},
        "cosine": found.cosine,
        "both_moved_share": found.both_share,
        "sign_agreement": found.sign_agreement,
    }
