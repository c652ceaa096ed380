"""Sampling: what proposes genomes, told how earlier ones did."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.sampling.base import Sampler, Told
from evomerge.spec import SamplerSpec

__all__ = ["Sampler", "Told", "make_sampler"]


def make_sampler(
    spec: SamplerSpec,
    *,
    genes: int,
    init: Sequence[float],
    objectives: int,
    gene_names: Sequence[str],
) -> Sampler:
    """The sampler that `spec` names, knowing nothing yet.

    `init` [genes] is the start point in the unit cube, `gene_names` [genes] are distinct. `auto`
    populations depend on `genes` and the sampler only, never on the number of workers. Raises
    ValueError for arguments that do not fit together and UserError where a package is missing.
    """
    if not (genes == len(init) == len(gene_names) == len(set(gene_names))) or genes < 1:
        raise ValueError(
            f"expected one start value and one distinct name for each of at least one gene; got "
            f"{genes} genes, {len(init)} values, {len(set(gene_names))} distinct names"
        )
    # each sampler's packages are loaded only when it is asked for: `evomerge status` needs none
    if spec.name == "random":
        from evomerge.sampling.random import RandomSampler

        return RandomSampler(spec, genes=genes, objectives=objectives)
    if spec.name == "cmaes":
        from evomerge.sampling.cmaes import CmaEsSampler

        return CmaEsSampler(spec, init=init, objectives=objectives)
    from evomerge.sampling.optuna import OptunaSampler

    return OptunaSampler(spec, init=init, objectives=objectives, gene_names=gene_names)
