"""Sampling: what proposes genomes, told how earlier ones did."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from evomerge.sampling.base import Restart, Sampler, Told
from evomerge.spec import SamplerSpec
from evomerge.trial import Genome

__all__ = ["Restart", "Sampler", "Told", "make_sampler", "versions"]

_OURS = "2"  # raised whenever the same tells lead to other genomes


def versions(spec: SamplerSpec) -> dict[str, str]:
    """What decides, with a study's history, which genomes come next: versions by package."""
    library = {"cmaes": "cmaes", "random": "numpy"}.get(spec.name, "optuna")
    found = {package: version(package) for package in sorted({library, "numpy"})}
    return {"evomerge.sampling": _OURS, **found}


def make_sampler(
    spec: SamplerSpec,
    *,
    genes: int,
    init: Sequence[float],
    objectives: int,
    gene_names: Sequence[str],
    levels: Sequence[int] = (),
    promising: Sequence[Genome] = (),
    init_first: bool = False,
) -> Sampler:
    """The sampler that `spec` names, knowing nothing yet.

    `init` [genes] is the start point in the unit cube, `gene_names` [genes] are distinct. `auto`
    populations depend on `genes` and the sampler only, never on the number of workers. `levels`
    [genes] says how many cells of [0, 1] a discrete gene has, 0 for a continuous one; `promising`
    [k, genes] are good genomes of an earlier study, which CMA-ES starts from; with `init_first` its
    genome 0 is `init` itself. Raises ValueError for arguments that do not fit together and
    UserError where a package is missing.
    """
    if levels and (len(levels) != genes or any(count < 0 or count == 1 for count in levels)):
        raise ValueError(f"expected 0 or at least 2 levels for each of {genes} genes; got {levels}")
    if not (genes == len(init) == len(gene_names) == len(set(gene_names))) or genes < 1:
        raise ValueError(
            f"expected one start value and one distinct name for each of at least one gene; got "
            f"{genes} genes, {len(init)} values, {len(set(gene_names))} distinct names"
        )
    # each sampler's packages are loaded only when it is asked for: `evomerge status` needs none
    if spec.name == "random":
        from evomerge.sampling.random import RandomSampler

        return RandomSampler(spec, objectives=objectives, levels=levels or [0] * genes)
    if spec.name == "cmaes":
        from evomerge.sampling.cmaes import cmaes_sampler

        return cmaes_sampler(
            spec,
            init=init,
            objectives=objectives,
            levels=levels,
            promising=promising,
            init_first=init_first,
        )
    from evomerge.sampling.optuna import OptunaSampler

    return OptunaSampler(
        spec,
        init=init,
        objectives=objectives,
        gene_names=gene_names,
        levels=levels or [0] * genes,
    )
