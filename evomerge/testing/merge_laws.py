"""The laws of merge methods, as functions that a method's author can run.

    for seed in range(100):
        for broken in broken_laws(MyMethod(), obeyed(), random_case(seed)):
            print(broken)

A law takes a method and a case (a base, sources, parameters) and raises LawBroken. Which laws a
method obeys, under which parameters, is data: `OBEYED` for the methods shipped. Knows no
checkpoint; drives a method through survey, prepare and merge as materialising does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Coefficients, Fitted, MergeMethod, Parameter
from evomerge.merging.values import Scalar
from evomerge.testing.fitted_cases import LEARNED

TENSOR = "model.layers.0.mlp.up_proj.weight"

Parameters = Mapping[str, Scalar]


class LawBroken(AssertionError):
    """A merge method breaks a law; the message names both and shows the case."""


@dataclass(frozen=True)
class Case:
    """One tensor to merge: base [n] and the sources [n] by name, in the recipe's order.

    `parameters` holds for every source; `own` overrides it for single sources. `shape` is the
    tensor's before it was flattened; None for a vector. `fitted` is what was learned of all of the
    sources, for a method that applies an artifact.
    """

    base: Tensor
    sources: Mapping[str, Tensor]
    parameters: Parameters = field(default_factory=dict)
    own: Mapping[str, Parameters] = field(default_factory=dict)
    seed: int = 0
    shape: tuple[int, ...] | None = None
    fitted: Fitted | None = None

    def given(self, **parameters: Scalar) -> Case:
        """The same case with some parameters set, for the recipe and for every source."""
        own = {
            name: {key: value for key, value in values.items() if key not in parameters}
            for name, values in self.own.items()
        }
        return replace(self, parameters={**self.parameters, **parameters}, own=own)

    def of(self, sources: Mapping[str, Tensor]) -> Case:
        """The same case with other sources."""
        return replace(self, sources=dict(sources))


def merged(method: MergeMethod, case: Case, *, block_size: int | None = None) -> Tensor:
    """Merge a case, cut into blocks of `block_size` elements. Shapes: returns [n] float32."""
    coefficients = coefficients_of(method, case)
    size = case.base.numel()
    step = block_size or max(size, 1)
    sources = torch.stack([case.sources[name] for name in coefficients.names])

    def blocks() -> Iterator[Block]:
        for start in range(0, size, step):
            cut = slice(start, start + step)
            base = case.base[cut].clone() if _sees_base(method) else None
            yield Block(base, sources[:, cut].clone(), start)

    survey = method.survey(lambda: iter([(coefficients, blocks)]))
    prepared = method.prepare(blocks, coefficients, survey)
    return torch.cat([method.merge(block, coefficients, prepared) for block in blocks()])


def random_case(
    seed: int,
    *,
    method: MergeMethod | None = None,
    size: int = 50,
    sources: int = 3,
    born: torch.dtype = torch.bfloat16,
    spread: float = 1e-3,
) -> Case:
    """Random weights of σ = 0.02 and fine-tunes `spread` away from them, stored as dtype `born`.

    A fifth of all task-vector entries and a tenth of the base are exactly 0, of either sign. With a
    `method`, its parameters are random too (source scope: for every source on its own), inside
    their bounds, and the shape is any matrix of that size.
    """
    generator = torch.Generator().manual_seed(seed)
    dice = random.Random(seed)
    base = (torch.randn(size, generator=generator) * 0.02).to(born).float()
    base *= torch.rand(size, generator=generator) > 0.1
    names = dice.sample(["add", "Ziel", "code", "math", "é", "sort", "x-1", "b"], sources)
    models: dict[str, Tensor] = {}
    for name in names:
        tuned = (base + torch.randn(size, generator=generator) * spread).to(born).float()
        frozen = torch.rand(size, generator=generator) < 0.2
        models[name] = torch.where(frozen, base, tuned)
    if method is None:
        return Case(base, models, seed=seed)
    shared = {p.name: _random_value(p, dice) for p in method.parameters if p.scope == "recipe"}
    varied = [p for p in method.parameters if p.scope == "source"]
    own = {name: {p.name: _random_value(p, dice) for p in varied} for name in names}
    shape = _random_matrix(size, dice)
    learned = LEARNED[method.artifact](dice, TENSOR, shape, names) if method.artifact else None
    return Case(base, models, shared, own, seed, shape, learned)


# The laws, numbered as in the project's specification.


def zero_scale_is_base(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P1: with the scale 0 the result is the base, bit for bit."""
    _same_bits(merged(method, case.given(**given)), case.base, "the base")


def neutral_is_source(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P2: under neutral parameters the result is the (last) source, bit for bit."""
    few = dict(list(case.sources.items())[: method.min_sources])
    last = list(few.values())[-1]
    _same_bits(merged(method, case.of(few).given(**given)), last, "the source")


def untrained_is_base(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P3: where every source equals the base, so does the result."""
    copies = {name: case.base.clone() for name in case.sources}
    result = merged(method, case.of(copies).given(**given))
    _close(result, case.base, case, "the base", ulps=4)


def copies_are_source(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P4: identical sources merge to that source, to a few roundings."""
    first = next(iter(case.sources.values()))
    copies = {name: first.clone() for name in case.sources}
    result = merged(method, case.of(copies).given(**given))
    _close(result, first, case, "the source", ulps=8)


def order_is_irrelevant(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P5: the order of the recipe's sources does not change a bit."""
    case = case.given(**given)
    turned = case.of(dict(reversed(list(case.sources.items()))))
    _same_bits(merged(method, turned), merged(method, case), "the merge in another order")


def scales_with_task_vectors(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P6: around a zero base, doubled sources give a doubled result."""
    case = replace(case.given(**given), base=torch.zeros_like(case.base))
    doubled = case.of({name: source * 2 for name, source in case.sources.items()})
    _same_bits(merged(method, doubled), merged(method, case) * 2, "the doubled merge")


def cutting_is_irrelevant(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P7: no bit depends on how the tensor is cut into blocks."""
    case = case.given(**given)
    whole = merged(method, case)
    for block_size in (1, 7, 1000):
        cut = merged(method, case, block_size=block_size)
        _same_bits(cut, whole, f"the merge in one block (blocks of {block_size})")


def weightless_is_absent(method: MergeMethod, case: Case, given: Parameters) -> None:
    """A source of weight 0 might as well not be there, bit for bit."""
    case = case.given(**given)
    if len(case.sources) <= method.min_sources:
        return
    first = next(iter(case.sources))
    without = case.of({name: tau for name, tau in case.sources.items() if name != first})
    own = {**case.own, first: {**case.own.get(first, {}), "weight": 0.0}}
    present = merged(method, replace(case, own=own))
    _same_bits(present, merged(method, without), "the merge without that source")


def seed_decides(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P8: one seed always gives the same bits; given p = ½ and 40 entries, another seed others."""
    case = case.given(**given)
    _same_bits(merged(method, case), merged(method, case), "itself, merged again")
    other = merged(method, replace(case, seed=case.seed + 1))
    moving = sum((s != case.base).sum() for s in case.sources.values())
    if int(moving) >= 40 and torch.equal(other, merged(method, case)):
        raise LawBroken(f"{method.name}: another seed changes nothing")


def inputs_are_untouched(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P10: the result is float32, as long as the block, and no input was written to."""
    case = case.given(**given)
    coefficients = coefficients_of(method, case)
    sources = torch.stack([case.sources[name] for name in coefficients.names])
    block = Block(case.base.clone() if _sees_base(method) else None, sources.clone(), 0)
    survey = method.survey(lambda: iter([(coefficients, lambda: iter([block]))]))
    prepared = method.prepare(lambda: iter([block]), coefficients, survey)
    result = method.merge(block, coefficients, prepared)
    if result.shape != case.base.shape or result.dtype != torch.float32:
        raise LawBroken(f"{method.name}: returned {result.dtype} {list(result.shape)}")
    _same_bits(block.sources, sources, "the sources before the merge")
    if block.base is not None:
        _same_bits(block.base, case.base, "the base before the merge")


def supports_are_nested(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P11: what one source changes at a density it changes at every higher one."""
    name, source = next(iter(case.sources.items()))
    zero = replace(case.given(**given), base=torch.zeros_like(case.base)).of({name: source})
    smallest = min(2 / max(case.base.numel(), 2), 1.0)
    densities = sorted({smallest, 0.1, 0.3, 0.5, 0.8, 1.0} - {0.0})
    supports = [merged(method, zero.given(density=d)) != 0 for d in densities if d >= smallest]
    for fewer, more in itertools.pairwise(supports):
        if bool((fewer & ~more).any()):
            raise LawBroken(f"{method.name}: a higher density drops what a lower one keeps")


def extremes_stay_finite(method: MergeMethod, case: Case, given: Parameters) -> None:
    """P12: zero, denormal and huge weights (1e30) give finite results."""
    case = case.given(**given)
    for scale in (0.0, 1e-43, 1e30):
        base = torch.sign(case.base) * scale
        sources = {name: torch.sign(tau - case.base) * scale for name, tau in case.sources.items()}
        if not bool(merged(method, replace(case, base=base, sources=sources)).isfinite().all()):
            raise LawBroken(f"{method.name}: weights of ±{scale:g} merge to NaN or infinity")


Law = Callable[[MergeMethod, Case, Parameters], None]

_ALWAYS: tuple[Law, ...] = (
    order_is_irrelevant,
    cutting_is_irrelevant,
    inputs_are_untouched,
    extremes_stay_finite,
)

Obeyed = Sequence[tuple[Law, Parameters]]


def obeyed(*laws: tuple[Law, Parameters]) -> Obeyed:
    """These laws, and those that every method obeys."""
    return (*((law, MappingProxyType({})) for law in _ALWAYS), *laws)


def broken_laws(method: MergeMethod, obeyed: Obeyed, case: Case) -> list[str]:
    """One line for each law that the method breaks on this case."""
    broken = []
    for law, given in obeyed:
        try:
            law(method, case, given)
        except LawBroken as error:
            broken.append(f"{law.__name__} {dict(given)}: {error}")
    return broken


def coefficients_of(method: MergeMethod, case: Case) -> Coefficients:
    """A case's parameters, as a recipe of one tensor resolves them."""
    recipe_order = list(case.sources)
    names = sorted(recipe_order)
    source: dict[str, tuple[Scalar, ...]] = {}
    shared: dict[str, Scalar] = {}
    for parameter in method.parameters:
        value = case.parameters.get(parameter.name, parameter.default)
        if parameter.scope == "recipe":
            shared[parameter.name] = value
        else:
            own = [case.own.get(name, {}).get(parameter.name, value) for name in names]
            source[parameter.name] = tuple(own)
    return Coefficients(
        tensor=TENSOR,
        shape=case.shape or (case.base.numel(),),
        names=tuple(names),
        order=tuple(recipe_order.index(name) for name in names),
        source=source,
        recipe=shared,
        seed=case.seed,
        fitted=case.fitted,
    )


def _sees_base(method: MergeMethod) -> bool:
    return method.needs_base or method.takes_base


def _random_value(parameter: Parameter, dice: random.Random) -> Scalar:
    if parameter.kind == "bool":
        return dice.random() < 0.5
    if parameter.kind == "choice":
        return dice.choice(parameter.choices)
    low = -0.5 if parameter.low is None else parameter.low
    high = 1.5 if parameter.high is None else parameter.high
    return dice.uniform(low, high)


def _random_matrix(size: int, dice: random.Random) -> tuple[int, int]:
    rows = dice.choice([rows for rows in range(1, size + 1) if size % rows == 0])
    return rows, size // rows


def _same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    different = found.view(torch.int32) != expected.view(torch.int32)
    if bool(different.any()):
        index = int(different.flatten().nonzero()[0])
        pair = (found.flatten()[index].item(), expected.flatten()[index].item())
        raise LawBroken(
            f"not {what}, bit for bit: {int(different.sum())} of {found.numel()} elements differ, "
            f"the first at {index}: {pair[0]!r} instead of {pair[1]!r}"
        )


def _close(found: Tensor, expected: Tensor, case: Case, what: str, *, ulps: int) -> None:
    """Within some roundings of the largest number that went into each element."""
    largest = torch.stack([case.base.abs(), *(s.abs() for s in case.sources.values())]).amax(0)
    allowed = ulps * torch.finfo(torch.float32).eps * torch.maximum(largest, expected.abs())
    excess = (found - expected).abs() - allowed
    if bool((excess > 0).any()):
        index = int(excess.argmax())
        raise LawBroken(
            f"not {what}: element {index} is {found[index].item()!r} "
            f"instead of {expected[index].item()!r}"
        )
