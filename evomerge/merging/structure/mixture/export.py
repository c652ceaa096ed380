"""Make dense models the experts of a mixture, and write it as an ordinary checkpoint.

The folder comes to be there whole or not at all; what was cut off goes on when it is called again
for the same thing, without running the base again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import evomerge
from evomerge.checkpoints.compare import compare, other_depths
from evomerge.checkpoints.weights import Model
from evomerge.errors import SpecError
from evomerge.merging.aside import Aside, check_free, flush, written_aside
from evomerge.merging.export import SHARD_BYTES, companions
from evomerge.merging.merge import DTYPES
from evomerge.merging.structure.mixture.architectures import (
    architecture_of,
    missing_biases,
    mixture_config,
    outside,
)
from evomerge.merging.structure.mixture.gates import DEGENERATE, Prompts, conditions, gate_rows
from evomerge.merging.structure.mixture.recipe import MixtureRecipe
from evomerge.merging.structure.mixture.tensors import Mixture
from evomerge.merging.structure.weight_files import (
    Progress,
    finite_digest,
    write_model,
    write_text,
)

MIXTURE_FILE = "evomerge_mixture.json"
"""What the mixture was made of: recipe, digests of the models, condition of each layer's router."""

_ROWS_FILE = "rows.safetensors"
_ROOM = 1 << 20


@dataclass(frozen=True)
class MixtureProblem:
    """A recipe with its models opened. `prompts` are the experts' tokens, after them those of a
    shared expert with a gate of its own; for random gates empty ones."""

    recipe: MixtureRecipe
    base: Model
    experts: Sequence[Model]
    shared: Model | None
    prompts: Sequence[Prompts]
    device: str = "cpu"

    @property
    def models(self) -> dict[str, Model]:
        """Every model by its place in the recipe."""
        named = {f"experts.{number}": model for number, model in enumerate(self.experts)}
        shared = {"shared_experts.0": self.shared} if self.shared is not None else {}
        return {"base_model": self.base, **named, **shared}


@dataclass(frozen=True)
class MixtureReport:
    """What was made: the architecture, and the condition number of each layer's router."""

    architecture: str
    conditions: tuple[float, ...]


def make_mixture(
    problem: MixtureProblem,
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda what, done, total: None,
) -> MixtureReport:
    """Write the mixture to `directory`, with the base's tokenizer and `MIXTURE_FILE`.

    The base is run in float32 where gates need it; then the weights stream, so that memory holds a
    few tensors. Logs a warning for routers that hardly tell the experts apart.

    Raises ExportError if the directory exists and is not empty or cannot be written; SpecError with
    every reason why the models do not fit each other; MergeError for a base that cannot become the
    mixture asked for; NonFiniteTensor for NaN in a model.
    """
    check_free(directory)
    _check(problem)
    recipe, base = problem.recipe, problem.base
    architecture = architecture_of(recipe, base)
    config = mixture_config(architecture, base, recipe)
    zero = missing_biases(config, architecture, base, recipe)
    digests = {place: finite_digest(model) for place, model in problem.models.items()}
    purpose = _purpose(problem, digests, shard_bytes)
    with written_aside(directory, purpose, _size(problem)) as aside:
        rows = _rows(problem, aside, progress)
        routers, gates = rows[:, : len(recipe.experts)], rows[:, len(recipe.experts) :]
        mixture = Mixture(
            recipe,
            architecture,
            config,
            base,
            problem.experts,
            problem.shared,
            routers=routers,
            shared_gates=gates if gates.shape[1] else None,
            zero=zero,
        )
        report = MixtureReport(architecture.model_type, tuple(conditions(routers)))
        write_model(mixture, base, aside, shard_bytes, partial(progress, "writing the mixture"))
        document = _document(recipe, digests, report)
        write_text(aside.folder / MIXTURE_FILE, json.dumps(document, indent=1))
        aside.drop(_ROWS_FILE)
    _warn(problem, report)
    return report


def _check(problem: MixtureProblem) -> None:
    faults = problem.recipe.conflicts()
    others = {place: model for place, model in problem.models.items() if place != "base_model"}
    advice = "the mixture has the base's vocabulary: take an expert that has it too"
    faults += compare(problem.base, others, advice=advice) + other_depths(problem.base, others)
    if faults:
        raise SpecError("recipe", faults)


def _rows(problem: MixtureProblem, aside: Aside, progress: Progress) -> Tensor:
    """Rows [l, E + shared, d]: an earlier attempt's, or computed and kept for a later one."""
    path = aside.folder / _ROWS_FILE
    if _ROWS_FILE in aside.finished:
        rows: Tensor = load_file(path)["rows"]
        return rows
    rows = gate_rows(
        problem.recipe.gate,
        problem.base,
        problem.prompts,
        seed=problem.recipe.seed,
        device=problem.device,
        progress=partial(progress, "running the prompts"),
    )
    save_file({"rows": rows}, path)
    flush(path)
    aside.finish(_ROWS_FILE, None)
    return rows


def _warn(problem: MixtureProblem, report: MixtureReport) -> None:
    log = logging.getLogger(__name__)
    bad = [str(at) for at, value in enumerate(report.conditions) if not value <= DEGENERATE]
    if bad:
        which = "all layers" if len(bad) == len(report.conditions) else f"layers {', '.join(bad)}"
        log.warning(
            "the routers of %s hardly tell the experts apart (condition number up to %.3g, above"
            " %g): some experts will seldom be used; give prompts that differ more",
            which,
            max(report.conditions),
            DEGENERATE,
        )
    if problem.recipe.needs_prompts and len({model.path for model in problem.experts}) == 1:
        log.warning(
            "all experts are %s: the mixture computes what it does", problem.experts[0].path
        )


def _document(
    recipe: MixtureRecipe, digests: dict[str, str], report: MixtureReport
) -> dict[str, Any]:
    return {
        "evomerge": evomerge.__version__,
        "recipe": recipe.model_dump(),
        "digests": digests,
        "architecture": report.architecture,
        "conditions": [v if math.isfinite(v) else None for v in report.conditions],
    }


def _purpose(problem: MixtureProblem, digests: dict[str, str], shard_bytes: int) -> str:
    """What makes two mixtures the same."""
    prompts = [asdict(own) for own in problem.prompts]
    recipe = problem.recipe.model_dump()
    known = [evomerge.__version__, recipe, digests, prompts, shard_bytes]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _size(problem: MixtureProblem) -> int:
    """Bytes of the weights, to the routers, and of what lies beside them."""
    elements = sum(math.prod(problem.base.shape(name)) for name in outside(problem.base))
    for model in [*problem.experts, *filter(None, [problem.shared])]:
        elements += sum(math.prod(model.shape(name)) for name in model.names if ".mlp." in name)
    dtype = DTYPES[problem.recipe.dtype] if problem.recipe.dtype else _widest(problem.base)
    beside = sum(path.stat().st_size for path in companions(problem.base))
    return elements * dtype.itemsize + beside + _ROOM


def _widest(model: Model) -> torch.dtype:
    return max((model.dtype(name) for name in model.names), key=lambda dtype: dtype.itemsize)
