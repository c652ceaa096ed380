"""A mergekit merge file as a recipe with the same meaning.

mergekit's defaults are written out, so that the recipe says all there is. What cannot be expressed
is refused by name. Reads no tensor; mergekit's own facts are in `mergekit_methods`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import SpecError
from evomerge.merging.mergekit_methods import (
    CHOICES,
    DECIDED,
    METHODS,
    RENAMED,
    REQUIRED,
    MergekitMethod,
    is_mergekit,
)
from evomerge.merging.mergekit_stack import (
    Layers,
    Rules,
    Slice,
    Use,
    is_whole,
    read_model,
    read_setting,
    read_slices,
    unsupported,
    with_one_module,
)
from evomerge.merging.mergekit_values import joined
from evomerge.merging.methods import registry
from evomerge.merging.methods.base import Parameter
from evomerge.merging.recipe import BASE, ModelRef, Recipe, Source
from evomerge.merging.values import Value
from evomerge.spec import locate, nearest
from evomerge.tokenizer_choice import TokenizerChoice, read_tokenizer


def read_mergekit(document: Mapping[str, Any], folder: Path, *, subject: str = "recipe") -> Recipe:
    """The recipe that a mergekit merge file stands for; relative paths are from `folder`.

    Raises SpecError with every key that is malformed or that we do not support.
    """
    if "genome" in document:
        fault = "is a mergekit-evolve file; `evomerge run FILE` searches what it describes"
        raise SpecError(subject, [fault])
    document = with_one_module(document)
    faults = list(unsupported(document))
    method = _method(document, faults)
    slices = read_slices(document, folder, faults)
    if faults or method is None:
        raise SpecError(subject, faults)
    recipe = _Reader(document, slices, folder, method, faults).recipe()
    if not faults:
        faults += registry.check(recipe)
    if faults:
        raise SpecError(subject, list(dict.fromkeys(faults)))
    return recipe


class _Reader:
    """Turns the slices of one stack into a recipe's parameters; faults are collected."""

    def __init__(
        self,
        document: Mapping[str, Any],
        slices: Sequence[Slice],
        folder: Path,
        method: MergekitMethod,
        faults: list[str],
    ) -> None:
        self._document, self._slices, self._faults = document, slices, faults
        self._folder = folder
        self._name, self._method = document["merge_method"], method
        self._method_here = method.ours or self._name
        self._ours = {p.name: p for p in registry.get(self._method_here).parameters}
        base = document.get("base_model") or slices[0].base
        self._base = None if base is None else read_model("base_model", base, folder, faults)

    def recipe(self) -> Recipe:
        uses = self._uses()
        self._check_bases(uses)
        self._check_names(uses)
        names = dict(zip(uses, _names(uses), strict=True))
        own = {
            use: {
                name: value
                for name in self._method.source
                if (value := self._value(name, use)) is not None
            }
            for use in uses
        }
        return Recipe(
            method=self._method_here,
            base=ModelRef(self._base) if self._base else None,
            sources=tuple(Source(names[use], ModelRef(use.path), own[use]) for use in uses),
            parameters=self._shared(),
            dtype=self._document.get("out_dtype") or self._document.get("dtype"),
            slices=() if is_whole(self._slices) else tuple(self._runs(names)),
            tokenizer=self._tokenizer(names),
            chat_template=self._document.get("chat_template"),
        )

    def _tokenizer(self, names: Mapping[Use, str]) -> TokenizerChoice | None:
        """The vocabulary that the file asks for; it calls models by their paths."""
        called = {use.path: name for use, name in names.items() if use.number == 1}
        if self._base is not None:
            called.setdefault(self._base, BASE)

        def name(model: str) -> str:
            path = locate(model, self._folder) or model
            if path not in called:
                self._faults.append(f"tokenizer: {model!r} is not one of the merge's models")
            return called.get(path, model)

        for key in ("tokenizer_source", "tokenizer"):
            if self._document.get(key) is not None:
                return read_tokenizer(self._document[key], self._faults, where=key, model=name)
        return None

    def _runs(self, names: Mapping[Use, str]) -> Iterator[dict[str, Layers]]:
        """For each slice the layers of its models; the base's under the name it has in slices."""
        for part in self._slices:
            runs = {names[use]: run for use, run in part.runs.items() if use in names}
            starts = self._base is not None and self._method.base == "start"
            if starts and (run := part.runs.get(Use(str(self._base)))) is not None:
                runs[BASE] = run
            yield runs

    def _shared(self) -> dict[str, Value]:
        """The merge's own parameters, with those that mergekit decides for its user."""
        shared: dict[str, Value] = {}
        for name in self._method.recipe:
            value = self._value(name, None)
            without_effect = name == "nuslerp_row_wise" and (
                value is False or shared.get("vectors") == "tensor"
            )
            if value is not None and not without_effect:
                shared[RENAMED.get(name, name)] = value
        for name, decided in DECIDED.items():
            ours = self._ours.get(name)
            if ours is not None and (not ours.choices or decided in ours.choices):
                shared[name] = decided
        if "origin" in self._ours:
            start = self._base is not None and self._method.base == "start"
            shared["origin"] = "base" if start else "zero"
        return shared

    def _uses(self) -> list[Use]:
        """The merged models in the order of the recipe."""
        listed = list(dict.fromkeys(use for part in self._slices for use in part.models))
        if self._base is None:
            if self._method.base == "first":
                self._faults.append(f"base_model: {self._name} starts from it; name one of the two")
            return listed
        base, role = Use(self._base), self._method.base
        if role == "first":
            return [base, *(use for use in listed if use != base)]
        if role == "model":
            # to mergekit the base is one more model of the average
            return listed if base in listed else [base, *listed]
        return [use for use in listed if use != base]

    def _check_bases(self, uses: Sequence[Use]) -> None:
        paths = [use.path for use in uses]
        for part in self._slices:
            swapped = self._method.base == "first" and part.base in paths
            if part.base not in (None, self._base) and not swapped:
                self._faults.append(
                    f"{part.where}.base_model: differs from the others; a recipe has one base"
                )
        if len(self._slices) == 1 and self._slices[0].layers is None:
            return
        for part in self._slices:
            if self._base is not None and Use(self._base) not in part.models:
                self._faults.append(
                    f"{part.where}.sources: base_model is not among them; mergekit wants it there"
                )

    def _check_names(self, uses: Sequence[Use]) -> None:
        """A parameter that mergekit would read without a word and drop."""
        source, recipe = self._method.source, self._method.recipe
        for where, entry, own in self._places(uses):
            for name in entry:
                if name in self._method.unused or (name in recipe and not own):
                    continue
                if name in source:
                    continue
                if name in recipe:
                    self._faults.append(
                        f"{where}.{name}: belongs to the merge; mergekit ignores it here, so move "
                        "it to the top-level `parameters` or remove it"
                    )
                else:
                    self._faults.append(
                        f"{where}.{name}: {self._name} has no such parameter and mergekit ignores "
                        f"it; remove it{nearest(name, [*source, *recipe])}"
                    )

    def _places(self, uses: Sequence[Use]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
        yield "parameters", self._document.get("parameters") or {}, False
        for part in self._slices:
            yield f"{part.where}.parameters".lstrip("."), part.parameters, False
            for use, (where, own) in part.models.items():
                if use in uses:
                    yield f"{where}.parameters", own, True

    def _value(self, name: str, use: Use | None) -> Value:
        """Our value of one of mergekit's parameters; None where there is none to write."""
        default = self._method.source.get(name, self._method.recipe.get(name))
        parts = [part for part in self._slices if use is None or self._takes_part(use, part)]
        per_slice = [self._rules(part, name, use, default) for part in parts]
        if any(rules is None for rules in per_slice):
            return None
        ranges = [part.layers for part in parts]
        rules = [rules for rules in per_slice if rules is not None]
        value = joined(ranges, rules, alone=len(self._slices) == 1)
        return self._converted(name, value, default)

    def _takes_part(self, use: Use, part: Slice) -> bool:
        """Whether a model is merged in a slice; a base that is one of the models always is."""
        return use in part.models or (part.layers is None and use.path == self._base)

    def _rules(self, part: Slice, name: str, use: Use | None, default: Any) -> Rules | None:
        """The rules that hold within a slice: the most specific place first."""
        where, own = part.models.get(use, (part.where, {})) if use else (part.where, {})
        places = [
            (f"{where}.parameters.{name}", own),
            (f"{part.where}.parameters.{name}".lstrip("."), part.parameters),
            (f"parameters.{name}", self._document.get("parameters") or {}),
        ]
        rules: Rules = []
        for place, entry in places if use else places[1:]:
            if entry.get(name) is not None and (not rules or rules[-1][0] is not None):
                rules += read_setting(place, entry[name], self._faults)
        if rules and rules[-1][0] is None:
            return self._turned(part, name, rules)
        if default is REQUIRED:
            who = f"{where or use.path}: " if use else ""
            self._faults.append(
                f"{who}{self._name} needs {name!r}"
                + (" for every tensor: end its filters with a bare value" if rules else "")
            )
            return None
        return self._turned(part, name, [*rules, (None, default)])

    def _turned(self, part: Slice, name: str, rules: Rules) -> Rules:
        """In a slice whose base is the other model, SLERP runs the other way."""
        if self._method.base != "first" or name != "t" or part.base in (None, self._base):
            return rules
        return [
            (wanted, [1 - knot for knot in value] if isinstance(value, list) else 1 - value)
            for wanted, value in rules
        ]

    def _converted(self, name: str, value: Value, default: Any) -> Value:
        """The value as our parameter of that name takes it; None if it is ours by default."""
        parameter = self._ours.get(RENAMED.get(name, name))
        if parameter is not None:
            return _as_kind(name, value, parameter, self._faults)
        if value != default:
            self._faults.append(f"{name}: our {self._name} cannot take it; remove it")
        return None


def _method(document: Mapping[str, Any], faults: list[str]) -> MergekitMethod | None:
    name = document.get("merge_method")
    if not isinstance(name, str):
        faults.append("missing key 'merge_method'")
    elif name not in METHODS and name not in registry.METHODS:
        faults.append(f"merge_method: unknown {name!r}{nearest(name, METHODS)}")
    elif name not in METHODS:
        faults.append(f"merge_method: {name!r} is not one of mergekit's; write a recipe of ours")
    elif (METHODS[name].ours or name) not in registry.METHODS:
        known = ", ".join(n for n in sorted(METHODS) if (METHODS[n].ours or n) in registry.METHODS)
        faults.append(f"merge_method: {name!r} is not supported; supported: {known}")
    else:
        method = METHODS[name]
        if method.base == "start" and registry.METHODS[method.ours or name].needs_base:
            needs = document.get("slices") is None and document.get("base_model") is None
            faults += ["base_model: missing; task vectors start from it"] if needs else []
        return method
    return None


def _names(uses: Sequence[Use]) -> list[str]:
    """A short name for each model: the last part of its path, made unique."""
    names: list[str] = []
    for use in uses:
        stem = Path(use.path.rpartition("+")[2]).name or "model"
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def _as_kind(name: str, value: Value, parameter: Parameter, faults: list[str]) -> Value:
    """mergekit's parameters are numbers; ours may be switches or choices."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [
            {**rule, "value": _as_kind(name, rule["value"], parameter, faults)} for rule in value
        ]
    if parameter.kind == "float":
        return [float(v) for v in value] if isinstance(value, list) else float(value)
    if isinstance(value, list):
        faults.append(f"{name}: is a switch, so it cannot be a gradient")
        return parameter.default
    if parameter.kind == "bool":
        return bool(value)
    return CHOICES.get((name, bool(value)), value)


__all__ = ["is_mergekit", "read_mergekit"]
