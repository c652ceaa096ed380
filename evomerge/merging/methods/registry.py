"""The merge methods by name, and what a recipe's parameters mean to them.

Checks recipes as far as text alone can be checked and resolves a recipe's parameters for one
tensor. Opens no checkpoint and does no tensor maths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from evomerge.errors import MergeError
from evomerge.merging.layout import Place
from evomerge.merging.methods.adamerging import AdaMerging
from evomerge.merging.methods.arcee_fusion import ArceeFusion
from evomerge.merging.methods.base import Coefficients, MergeMethod, MethodFacts, Parameter
from evomerge.merging.methods.breadcrumbs import Breadcrumbs
from evomerge.merging.methods.breadcrumbs_ties import BreadcrumbsTies
from evomerge.merging.methods.consensus import Consensus
from evomerge.merging.methods.consensus_ties import ConsensusTies
from evomerge.merging.methods.dam import Dam
from evomerge.merging.methods.dare_linear import DareLinear
from evomerge.merging.methods.dare_ties import DareTies
from evomerge.merging.methods.della import Della
from evomerge.merging.methods.della_linear import DellaLinear
from evomerge.merging.methods.fisher import Fisher
from evomerge.merging.methods.git_rebasin import GitRebasin
from evomerge.merging.methods.greedy_soup import GreedySoup
from evomerge.merging.methods.iso_c import IsoC
from evomerge.merging.methods.iso_cts import IsoCts
from evomerge.merging.methods.karcher import Karcher
from evomerge.merging.methods.learned_soup import LearnedSoup
from evomerge.merging.methods.linear import Linear
from evomerge.merging.methods.m_smoe import MSmoe
from evomerge.merging.methods.mats import MaTS
from evomerge.merging.methods.model_stock import ModelStock
from evomerge.merging.methods.multislerp import MultiSlerp
from evomerge.merging.methods.nearswap import NearSwap
from evomerge.merging.methods.nuslerp import NuSlerp
from evomerge.merging.methods.passthrough import Passthrough
from evomerge.merging.methods.pcb import Pcb
from evomerge.merging.methods.pleas import Pleas
from evomerge.merging.methods.ram import Ram
from evomerge.merging.methods.regmean import RegMean
from evomerge.merging.methods.sce import Sce
from evomerge.merging.methods.sens_merging import SensMerging
from evomerge.merging.methods.slerp import Slerp
from evomerge.merging.methods.structural import StructuralMethod
from evomerge.merging.methods.task_arithmetic import TaskArithmetic
from evomerge.merging.methods.ties import Ties
from evomerge.merging.methods.tsv_m import TsvM
from evomerge.merging.methods.widen import Widen
from evomerge.merging.parts import faults as part_faults
from evomerge.merging.parts import parts
from evomerge.merging.recipe import Recipe
from evomerge.merging.values import Scalar, Value, leaves, normalise, resolve
from evomerge.spec import nearest

METHODS: Mapping[str, MergeMethod] = MappingProxyType(
    {
        method.name: method
        for method in (
            Linear(),
            TaskArithmetic(),
            Ties(),
            DareLinear(),
            DareTies(),
            Slerp(),
            NuSlerp(),
            MultiSlerp(),
            Karcher(),
            GreedySoup(),
            Fisher(),
            RegMean(),
            MaTS(),
            Dam(),
            ModelStock(),
            NearSwap(),
            Passthrough(),
            Sce(),
            Breadcrumbs(),
            BreadcrumbsTies(),
            Della(),
            DellaLinear(),
            Ram(),
            ArceeFusion(),
            Consensus(),
            ConsensusTies(),
            IsoC(),
            IsoCts(),
            TsvM(),
            Pcb(),
            Widen(),
            SensMerging(),
            AdaMerging(),
            LearnedSoup(),
            GitRebasin(),
        )
    }
)

STRUCTURAL: Mapping[str, StructuralMethod] = MappingProxyType(
    {method.name: method for method in (Pleas(), MSmoe())}
)
"""The methods whose result is no function of one tensor at a time."""

ALL: Mapping[str, MethodFacts] = MappingProxyType({**METHODS, **STRUCTURAL})


def get(name: str) -> MergeMethod:
    """The method of that name, of those that merge tensor by tensor. Raises MergeError that
    suggests the nearest known one."""
    if name in STRUCTURAL:
        raise MergeError(f"{name} merges whole models, not single tensors")
    if name not in METHODS:
        raise MergeError(_unknown_method(name))
    return METHODS[name]


def facts(name: str) -> MethodFacts:
    """What is known of any method. Raises MergeError that suggests the nearest known one."""
    if name not in ALL:
        raise MergeError(_unknown_method(name))
    return ALL[name]


def check(recipe: Recipe) -> list[str]:
    """Every problem of a recipe, one plain line each; an empty list for a recipe that is fine.

    A parameter of source scope may stand at recipe level: it is the default of all sources.
    """
    if broken := list(part_faults(recipe)):
        return broken
    if recipe.artifact is not None and recipe.slices:
        return [
            "slices: what a fit learned is of layers in their own places; merge whole models by the"
            " artifact, then stack the layers of that merge"
        ]
    if (fault := _structural_fault(recipe)) is not None:
        return [fault]
    found = {part.where: _part_faults(part.recipe, part.where) for part in parts(recipe).values()}
    return list(dict.fromkeys(fault for faults in found.values() for fault in faults))


def _structural_fault(recipe: Recipe) -> str | None:
    used = [recipe.method, *(group.method for group in recipe.groups)]
    name = next((name for name in used if name in STRUCTURAL), None)
    if name is None:
        return None
    given = [key for key in ("groups", "slices", "tokenizer") if getattr(recipe, key)]
    if not given:
        return None
    return f"{given[0]}: {name} changes the structure of whole models; leave {given[0]} out"


def _part_faults(recipe: Recipe, where: str) -> Iterator[str]:
    """The problems of a recipe without groups and slices, each behind the part's name."""
    prefix = f"{where}: " if where else ""
    return (f"{prefix}{fault}" for fault in _plain_faults(recipe))


def _plain_faults(recipe: Recipe) -> list[str]:
    if recipe.method not in ALL:
        return [_unknown_method(recipe.method)]
    method = ALL[recipe.method]
    faults = list(_model_faults(recipe, method))
    known = {parameter.name: parameter for parameter in method.parameters}
    for name, value in recipe.parameters.items():
        faults += _faults(f"parameters.{name}", name, value, known, method)
    own = {name: parameter for name, parameter in known.items() if parameter.scope == "source"}
    for source in recipe.sources:
        for name, value in source.parameters.items():
            where = f"sources.{source.name}.{name}"
            if name in known and name not in own:
                faults.append(f"{where}: {name!r} belongs to the recipe; put it under `parameters`")
            else:
                faults += _faults(where, name, value, own, method)
    return faults


def coefficients(recipe: Recipe, place: Place, shape: tuple[int, ...]) -> Coefficients:
    """Every parameter of a recipe's method, resolved for the tensor at `place`.

    A source's own value wins over the recipe's, the recipe's over the default. Sources are sorted
    by name. Raises MergeError where a value has no rule for the tensor.
    """
    method = facts(recipe.method)
    order = sorted(range(len(recipe.sources)), key=lambda index: recipe.sources[index].name)
    source: dict[str, tuple[Scalar, ...]] = {}
    shared: dict[str, Scalar] = {}
    for parameter in method.parameters:
        value = recipe.parameters.get(parameter.name, parameter.default)
        if parameter.scope == "recipe":
            shared[parameter.name] = _resolve(parameter.name, value, place)
        else:
            source[parameter.name] = tuple(
                _resolve(
                    parameter.name,
                    recipe.sources[index].parameters.get(parameter.name, value),
                    place,
                )
                for index in order
            )
    return Coefficients(
        tensor=place.name,
        shape=shape,
        names=tuple(recipe.sources[index].name for index in order),
        order=tuple(order),
        source=source,
        recipe=shared,
        seed=recipe.seed,
    )


def _unknown_method(name: str) -> str:
    return f"unknown merge method {name!r}{nearest(name, ALL)}"


def _model_faults(recipe: Recipe, method: MethodFacts) -> Iterator[str]:
    if method.needs_base and recipe.base is None:
        yield f"{method.name} merges task vectors and needs a `base`"
    if recipe.base is None:
        yield from _choices_without_base(recipe, method)
    if method.artifact is not None and recipe.artifact is None:
        yield (
            f"{method.name} applies what a fit has learned: fit it (`evomerge fit`), and name the"
            " folder as `artifact`"
        )
    count, least, most = len(recipe.sources), method.min_sources, method.max_sources
    if count < least or (most is not None and count > most):
        wanted = f"exactly {least}" if most == least else f"at least {least}"
        yield f"{method.name} merges {wanted} source{'s' * (least != 1)}, the recipe has {count}"
    names = [source.name for source in recipe.sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"source {name!r} is listed twice; give each source a name of its own"


def _choices_without_base(recipe: Recipe, method: MethodFacts) -> Iterator[str]:
    for parameter in method.parameters:
        try:
            values = leaves(normalise(recipe.parameters.get(parameter.name, parameter.default)))
        except ValueError:
            continue  # malformed; `_faults` says so
        for choice in parameter.base_choices:
            if choice in values:
                yield f"parameters.{parameter.name}: {choice!r} needs a `base`"


def _faults(
    where: str,
    name: str,
    value: Value,
    known: Mapping[str, Parameter],
    method: MethodFacts,
) -> Iterator[str]:
    if name not in known:
        yield f"{where}: {method.name} has no parameter {name!r}{nearest(name, known)}"
        return
    try:
        scalars = leaves(normalise(value))
    except ValueError as error:
        yield f"{where}: {error}"
        return
    found = (_scalar_fault(known[name], scalar) for scalar in scalars)
    for fault in dict.fromkeys(fault for fault in found if fault):
        yield f"{where}: {fault}"


def _scalar_fault(parameter: Parameter, value: Scalar) -> str | None:
    if parameter.kind == "bool":
        return None if isinstance(value, bool) else f"expected true or false, got {value!r}"
    if parameter.kind == "choice":
        if value in parameter.choices:
            return None
        return f"expected one of {', '.join(parameter.choices)}, got {value!r}"
    if isinstance(value, bool | str):
        return f"expected a number, got {value!r}"
    low, high = parameter.low, parameter.high
    if (low is not None and value < low) or (high is not None and value > high):
        return f"{value:g} is outside [{_bound(low, '-∞')}, {_bound(high, '∞')}]"
    return None


def _bound(value: float | None, unbounded: str) -> str:
    return unbounded if value is None else f"{value:g}"


def _resolve(name: str, value: Value, place: Place) -> Scalar:
    try:
        return resolve(value, place)
    except ValueError as error:
        raise MergeError(f"parameter {name!r}: {error}") from None
