"""Which vocabulary a merged model has, and where the rows of single tokens come from.

Data, read from a mergekit file's `tokenizer` or `tokenizer_source` and kept in a recipe. Knows no
checkpoint: whether a model or a token exists is found in `evomerge.checkpoints.vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evomerge.spec import nearest

BASE, UNION, INTERSECTION = "base", "union", "intersection"

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_KINDS = ("zero", "model_token")


@dataclass(frozen=True)
class TokenRule:
    """The row that a token has in the models that lack it; with `force`, in all models.

    `model` is whose row, None a row of zeros. `token` is another token of that model, or the
    number of one of its rows; None is the token itself.
    """

    model: str | None
    token: str | int | None = None
    force: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "token": self.token, "force": self.force}


@dataclass(frozen=True)
class TokenizerChoice:
    """`source` is base, union, intersection or the name of a model, whose vocabulary is kept.

    Without `pad_to_multiple_of` the output has as many rows as the model whose vocabulary it
    keeps, more only if tokens need them; with it, the least multiple that holds all tokens.
    """

    source: str = BASE
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON data."""
        return {
            "source": self.source,
            "tokens": {token: rule.to_json() for token, rule in self.tokens.items()},
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TokenizerChoice:
        """What `to_json` gave."""
        rules = {token: TokenRule(**rule) for token, rule in document["tokens"].items()}
        return cls(document["source"], rules, document["pad_to_multiple_of"])


def read_tokenizer(
    document: object,
    faults: list[str],
    *,
    where: str = "tokenizer",
    model: Callable[[str], str] = str,
) -> TokenizerChoice:
    """A choice as mergekit writes it: a word, or `{source, tokens, pad_to_multiple_of}`.

    `model` turns what the file calls a model into its name in the merge. Every fault is appended
    to `faults`, a line each.
    """
    if isinstance(document, str):
        document = {"source": document}
    if not isinstance(document, Mapping):
        faults.append(f"{where}: base, union, intersection, a model or a mapping, not {document!r}")
        return TokenizerChoice()
    for key in document:
        if key not in _KEYS:
            faults.append(f"{where}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    return TokenizerChoice(
        source=_source(document.get("source", BASE), faults, where, model),
        tokens=_rules(document.get("tokens") or {}, faults, f"{where}.tokens", model),
        pad_to_multiple_of=_multiple(document.get("pad_to_multiple_of"), faults, where),
    )


def _source(value: object, faults: list[str], where: str, model: Callable[[str], str]) -> str:
    if isinstance(value, str):
        return value if value in (BASE, UNION, INTERSECTION) else model(value)
    faults.append(f"{where}.source: base, union, intersection or a model, not {value!r}")
    return BASE


def _multiple(value: object, faults: list[str], where: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    faults.append(f"{where}.pad_to_multiple_of: a whole number above 0, not {value!r}")
    return None


def _rules(
    value: object, faults: list[str], where: str, model: Callable[[str], str]
) -> dict[str, TokenRule]:
    if not isinstance(value, Mapping):
        faults.append(f"{where}: a mapping of tokens to rules, not {value!r}")
        return {}
    rules = {str(t): _rule(r, faults, f"{where}.{t}", model) for t, r in value.items()}
    return {token: rule for token, rule in rules.items() if rule is not None}


def _rule(
    value: object, faults: list[str], where: str, model: Callable[[str], str]
) -> TokenRule | None:
    known = ("source", "force")
    if not isinstance(value, Mapping) or "source" not in value or set(value) - set(known):
        faults.append(f"{where}: {{source: MODEL or {{kind: ...}}, force: false}}, not {value!r}")
        return None
    source, force = value["source"], value.get("force", False)
    if not isinstance(force, bool):
        faults.append(f"{where}.force: true or false, not {force!r}")
    elif isinstance(source, str):
        return TokenRule(model(source), force=force)
    elif source == {"kind": "zero"}:
        return TokenRule(None, force=force)
    elif not isinstance(source, Mapping) or source.get("kind") not in _KINDS:
        kinds = ", ".join(_KINDS)
        faults.append(f"{where}.source: a model, or a mapping with kind {kinds}, not {source!r}")
    else:
        return _model_token(source, force, faults, f"{where}.source", model)
    return None


def _model_token(
    source: Mapping[str, Any],
    force: bool,
    faults: list[str],
    where: str,
    model: Callable[[str], str],
) -> TokenRule | None:
    given = [key for key in ("token", "token_id") if source.get(key) is not None]
    row = source[given[0]] if len(given) == 1 else None
    wanted = str if given == ["token"] else int
    extra = set(source) - {"kind", "model", "token", "token_id"}
    if extra or not isinstance(source.get("model"), str) or type(row) is not wanted:
        faults.append(
            f"{where}: {{kind: model_token, model: MODEL, token: TOKEN}} or token_id: NUMBER"
            f" in place of token, not {dict(source)!r}"
        )
        return None
    return TokenRule(model(source["model"]), row, force)
