"""Two tiny Llamas trained apart, in one: PLeaS beside averages, and beside its own variations.

    python benchmarks/pleas_llama.py --folder FOLDER [--seeds 0 1 2 3 4] [--same-base]

Every seed is two models with seeds of their own, each trained on a domain of its own: sequences
xₜ₊₁ = a·xₜ + b mod 64 with another (a, b) and now and then a jump. With --same-base both are
fine-tuned from one model that has seen both domains. Prints the loss on unseen sequences of both
domains, means over seeds. FOLDER keeps models, artifacts and losses, so that an interrupted run
goes on where it was; take a new one after a change of a method. Some four minutes a seed on a core.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from kept import Kept
from moe_mixtral import save
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import logging

from evomerge.checkpoints.adapted import open_model
from evomerge.merging.export import export
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import Fitter, Problem, fit
from evomerge.merging.fitted.calibration import Calibration, Example
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.merging.structure.architectures.permutation_fit import PermutationFit
from evomerge.merging.structure.pleas.fit import PleasFit
from evomerge.merging.structure.pleas.model import Pair

TOKENS = 64
JUMPS = 0.02  # share of the tokens that are drawn
DOMAINS = ("a", "b")
MOST = -1.0  # a budget: as much as can stay apart
BUDGETS = (1.0, 1.2, 1.4, MOST)


@dataclass(frozen=True)
class Setup:
    """How large the models are, how long they are trained, and how many sequences there are."""

    steps: int = 600
    batch: int = 32
    length: int = 24
    calibration: int = 128
    report: int = 256
    shape: Mapping[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )


def variants() -> dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """By what is said of it: the method, its parameters, and the settings of its fit."""
    found: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
        "average": ("linear", {}, None),
        "git_rebasin, weights": ("git_rebasin", {}, {"similarity": "weights"}),
        "git_rebasin, distance": ("git_rebasin", {}, {"similarity": "distance"}),
    }
    for budget in BUDGETS:
        at = "most" if budget == MOST else f"{budget:g}"
        for form in ("none", "parallel"):
            found[f"pleas {at}, {form}"] = _pleas(budget, form)
        for targets in ("both", "own"):
            found[f"pleas {at}, sequential, {targets}"] = _pleas(
                budget, "sequential", targets=targets
            )
    for budget in (1.0, 1.2):
        for similarity in ("distance", "correlation"):
            for form in ("none", "parallel", "sequential"):
                found[f"pleas {budget:g}, {form}, by {similarity}"] = _pleas(
                    budget, form, similarity=similarity
                )
        for ridge in (1e-3, 1e-1):
            for form in ("parallel", "sequential"):
                found[f"pleas {budget:g}, {form}, ridge {ridge:g}"] = _pleas(
                    budget, form, ridge=ridge
                )
    found["pleas 1.2, parallel, uniform"] = _pleas(1.2, "parallel", allocation="uniform")
    return found


def _pleas(
    budget: float,
    form: str,
    *,
    similarity: str = "weights",
    ridge: float = 1e-2,
    targets: str = "both",
    **parameters: Any,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    settings: dict[str, Any] = {"similarity": similarity, "batch_size": 64}
    if form == "sequential":
        settings["sequential"] = {"budget": budget, "ridge": ridge, "targets": targets}
        settings["grams"] = False
    parameters = {"budget": budget, "least_squares": form, "ridge": ridge, **parameters}
    return "pleas", parameters, settings


class Trained:
    """The two models of a seed, data that a merge may look at, and data to report on."""

    def __init__(self, setup: Setup, seed: int, folder: Path, *, same_base: bool) -> None:
        self.setup, self.seed, self.folder = setup, seed, folder
        generator = torch.Generator().manual_seed(seed)
        rules = torch.randperm(TOKENS * TOKENS // 2, generator=generator)[:2].tolist()
        self.rules = [(2 * (rule // TOKENS) + 1, rule % TOKENS) for rule in rules]
        self._trained(same_base)
        held_out = torch.Generator().manual_seed(10_000 + seed)
        counts = setup.calibration, setup.report
        self.calibration, self.report = (
            {name: self._drawn(at, n, held_out) for at, name in enumerate(DOMAINS)} for n in counts
        )

    def _trained(self, same_base: bool) -> None:
        paths = {name: self.folder / name for name in DOMAINS}
        if all((path / "config.json").exists() for path in paths.values()):
            return
        base = self._train(llama(self.setup, self.seed), (0, 1), 0) if same_base else None
        for at, path in enumerate(paths.values()):
            model = copy.deepcopy(base) if base else llama(self.setup, 2 * self.seed + at)
            save(self._train(model, (at,), at), path)

    def _train(self, model: Any, domains: Sequence[int], stream: int) -> Any:
        """AdamW with a short warm-up and cosine decay."""
        setup = self.setup
        generator = torch.Generator().manual_seed(100 * self.seed + 10 * len(domains) + stream)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 5e-3, total_steps=setup.steps, pct_start=0.1
        )
        model.train()
        for step in range(setup.steps):
            tokens = self._drawn(domains[step % len(domains)], setup.batch, generator)
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            schedule.step()
        return model.eval()

    def _drawn(self, domain: int, count: int, generator: torch.Generator) -> Tensor:
        """Sequences [n, t] of a domain."""
        factor, offset = self.rules[domain]
        tokens = [torch.randint(TOKENS, (count,), generator=generator)]
        for _ in range(self.setup.length - 1):
            drawn = torch.randint(TOKENS, (count,), generator=generator)
            jumps = torch.rand(count, generator=generator) < JUMPS
            tokens.append(torch.where(jumps, drawn, (factor * tokens[-1] + offset) % TOKENS))
        return torch.stack(tokens, 1)

    @cached_property
    def problem(self) -> Problem:
        models = {name: open_model(str(self.folder / name)) for name in DOMAINS}
        data = {
            n: tuple(Example(tuple(r)) for r in t.tolist()) for n, t in self.calibration.items()
        }
        digests = {model.path: model.scan().digest for model in models.values()}
        return Problem(None, models, digests, Calibration(data, dict.fromkeys(models, "chains")))

    def merged(
        self, method: str, parameters: Mapping[str, Any], settings: dict[str, Any] | None
    ) -> list[float]:
        """Its loss on both domains."""
        parameters = dict(parameters)
        if parameters.get("budget") == MOST:
            parameters["budget"] = self.most
        artifact = None
        if settings is not None:
            if "sequential" in settings:
                settings["sequential"]["budget"] = parameters["budget"]
            artifact = ModelRef(str(self._fitted(method, settings)))
        sources = tuple(
            Source(n, ModelRef(model.path)) for n, model in self.problem.sources.items()
        )
        recipe = Recipe(method, None, sources, parameters, artifact=artifact)
        with tempfile.TemporaryDirectory() as scratch:
            export(recipe, Path(scratch) / "out")
            return self.losses([Path(scratch) / "out"])

    @cached_property
    def most(self) -> float:
        """What a merge can cost, with all units apart that may be."""
        settings = {"similarity": "weights", "batch_size": 64}
        artifact = open_artifact(self._fitted("pleas", settings))
        maximum = Pair(*self.problem.sources.values(), artifact).costs.maximum
        return int(maximum * 1e4) / 1e4

    def _fitted(self, method: str, settings: Mapping[str, Any]) -> Path:
        fitter: Fitter = PleasFit() if method == "pleas" else PermutationFit()
        known = fitter.settings.model_validate(settings)
        digest = hashlib.sha256(known.model_dump_json().encode()).hexdigest()[:12]
        place = self.folder / f"{method}-{digest}"
        if not place.exists():
            fit(fitter, self.problem, known, place)
        return place

    @torch.no_grad()
    def losses(self, places: Sequence[Path]) -> list[float]:
        """On both domains, of the models' mean logits."""
        from transformers import AutoModelForCausalLM

        models = [AutoModelForCausalLM.from_pretrained(place).eval() for place in places]
        found = []
        for tokens in self.report.values():
            logits = sum(model(input_ids=tokens).logits for model in models) / len(models)
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            found.append(float(loss))
        return found


def llama(setup: Setup, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=TOKENS, max_position_embeddings=64, **setup.shape)
    )


def measured(setup: Setup, seed: int, folder: Path, *, same_base: bool) -> dict[str, list[float]]:
    """Losses on both domains by what is said of a model."""
    place = folder / f"{'base' if same_base else 'apart'}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    trained, kept = Trained(setup, seed, place, same_base=same_base), Kept(place / "losses.jsonl")
    each = {name: place / name for name in DOMAINS}
    found = {
        f"model {name}": kept.get(f"model {name}", lambda path=path: trained.losses([path]))
        for name, path in each.items()
    }
    found["ensemble (mean logits)"] = kept.get("ensemble", lambda: trained.losses([*each.values()]))
    for name, what in variants().items():
        found[name] = kept.get(name, lambda what=what: trained.merged(*what))
        print(f"{seed} {name} {found[name]}", file=sys.stderr, flush=True)
    return found


def page(seeds: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    """A table, means over seeds; of the mean over both domains the smallest and largest too."""
    lines = [
        "| model | domain a | domain b | mean | smallest to largest |",
        "|---|---|---|---|---|",
    ]
    for name in next(iter(seeds.values())):
        losses = [found[name] for found in seeds.values()]
        a, b = (statistics.fmean(loss[at] for loss in losses) for at in (0, 1))
        both = [statistics.fmean(loss) for loss in losses]
        lines.append(
            f"| {name} | {a:.3f} | {b:.3f} | {statistics.fmean(both):.3f}"
            f" | {min(both):.3f} to {max(both):.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--same-base", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    found = {
        seed: measured(Setup(), seed, arguments.folder, same_base=arguments.same_base)
        for seed in arguments.seeds
    }
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
