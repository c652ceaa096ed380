"""The README of an exported checkpoint: what it was merged from, and how.

Text only. Knows nothing of files and tensors.
"""

from __future__ import annotations

import re

import yaml

import evomerge
from evomerge.merging.recipe import ModelRef, Recipe

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(recipe: Recipe) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    return "\n".join(
        (
            "---",
            yaml.safe_dump(_front_matter(recipe), sort_keys=False).rstrip(),
            "---",
            f"# A merge by {recipe.method}",
            "",
            f"Merged with evomerge {evomerge.__version__} from:",
            "",
            *_table(recipe),
            "",
            f"Recipe (digest `{recipe.digest}`), also in `evomerge_recipe.json`:",
            "",
            "```yaml",
            yaml.safe_dump(_recipe(recipe), sort_keys=False).rstrip(),
            "```",
        )
    )


def _front_matter(recipe: Recipe) -> dict[str, object]:
    models = [recipe.base, *(source.model for source in recipe.sources)]
    on_hub = [model.path for model in models if model and _HUB_ID.fullmatch(model.path)]
    known = {"base_model": on_hub, "base_model_relation": "merge"} if on_hub else {}
    return {"library_name": "transformers", "tags": ["merge", "evomerge"], **known}


def _table(recipe: Recipe) -> list[str]:
    rows = [("base", recipe.base)] if recipe.base else []
    named = [*rows, *((source.name, source.model) for source in recipe.sources)]
    lines = [f"| {name} | {_shown(model)} | `{model.digest}` |" for name, model in named]
    return ["| | model | BLAKE3 of its contents |", "|---|---|---|", *lines]


def _recipe(recipe: Recipe) -> dict[str, object]:
    """The recipe as `evomerge merge` reads it, with models as they are shown to others."""
    return {
        "method": recipe.method,
        "base": _shown(recipe.base) if recipe.base else None,
        "sources": {s.name: {"path": _shown(s.model), **s.parameters} for s in recipe.sources},
        "parameters": dict(recipe.parameters),
        **({"artifact": recipe.artifact.digest} if recipe.artifact else {}),
        "dtype": recipe.dtype,
        "seed": recipe.seed,
    }


def _shown(model: ModelRef) -> str:
    """A name on the hub as it is; of a local path the last part, since a card is published."""
    return model.path if _HUB_ID.fullmatch(model.path) else model.path.rstrip("/").split("/")[-1]
