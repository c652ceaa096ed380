"""Which weights of a model are one and the same, as its architecture and config say.

Asks transformers' class of the architecture. Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tied_pairs(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Tied weights as {target: source}, for instance {lm_head.weight: model.embed_tokens.weight}.

    Empty where the config does not tie, or where transformers does not know the architecture.
    """
    if not config.get("tie_word_embeddings", True):
        return {}
    import transformers

    if "tie_word_embeddings" not in config and not _ties_by_default(folder):
        return {}
    architecture = next(iter(config.get("architectures") or ()), "")
    pairs = getattr(getattr(transformers, architecture, None), "_tied_weights_keys", None)
    return dict(pairs) if isinstance(pairs, Mapping) else {}


def _ties_by_default(folder: Path) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError):  # an architecture that transformers does not know
        return False
    return bool(getattr(config, "tie_word_embeddings", False))
