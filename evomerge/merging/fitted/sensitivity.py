"""The fit of Sens-Merging: how sensitive each source is in each layer, and how logits differ.

Knows no temperature and no merge: `evomerge.merging.methods.sens_merging` makes weights of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch, learned_names
from evomerge.merging.fitted.calibration import Example, batch, batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.sens_merging import layer_name

_HELD_BYTES = 1 << 30
"""Logits of one expert that are kept while those of the others are computed."""
_EXAMPLES_A_SAVE = 25


class SensitivitySettings(Settings):
    """`batch_size` is for logits; gradients are taken one example at a time."""

    batch_size: int = Field(default=8, ge=1)


class SensitivityFit(Fitter):
    """Measure what Sens-Merging weighs sources by.

        Sᵢˡ = meanₖ Σ_{W in l} Σⱼ|Wⱼ·∂Lᵢ(xₖ)/∂Wⱼ|     elementwise
            | meanₖ Σ_{W in l} |Σⱼ Wⱼ·∂Lᵢ(xₖ)/∂Wⱼ|     inner        x: source i's own examples
        gᵢⱼ = mean over source j's examples of the mean over tokens of ‖logitsᵢ − logitsⱼ‖₂

    L is the mean cross-entropy of an example's counted tokens; an absolute value of a sum over
    examples would not be the sum of theirs, hence a backward pass for each. Both run over the
    tokens that a loss counts. Sums in float64, the rest in float32.
    Artifact: tensors `elementwise` and `inner` [s, l], `distances` [s, s], all float64; facts
    `sources` [s] and `layers` [l].

    Costs N·m backward passes and (N² + N)·m forward ones, in one copy of the weights.

    Source: Liu et al. 2025, arXiv:2502.12420, as a third party's code has it; its loss counts the
    prompt too.
    """

    name = "sensitivity"
    summary = "how sensitive each source is in each layer, and how far logits lie apart"
    settings = SensitivitySettings
    needs_labels = True
    needs_gradients = True

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        network = Network(problem.anchor, device=problem.device)
        learned = learned_names(problem, network)
        layers = list(dict.fromkeys(layer_name(name) for name in learned))
        sources = list(problem.sources)
        sums, notes = draft.state or (_zeros(len(sources), len(layers)), {"done": 0})
        run = _Run(problem, network, learned, layers, settings.batch_size, sums)
        work = list(run.work())
        for done, step in enumerate(work[notes["done"] :], notes["done"] + 1):
            step()
            draft.save(sums, {"done": done}, flops=network.flops)
            watch.progress(done, len(work))
        counts = [len(problem.calibration.of(name)) for name in sources]
        means = torch.tensor(counts, dtype=torch.float64)
        found = {
            "elementwise": sums["elementwise"] / means[:, None],
            "inner": sums["inner"] / means[:, None],
            "distances": sums["distances"] / means[None, :],
        }
        for name, row in zip(sources, found["elementwise"], strict=True):
            for layer in (layer for layer, value in zip(layers, row, strict=True) if value == 0):
                watch.note(f"source {name!r} has no gradient in {layer}: its sensitivity is 0")
        draft.finish(found, {"sources": sources, "layers": layers}, flops=network.flops)


def _zeros(sources: int, layers: int) -> dict[str, Tensor]:
    shapes = {
        "elementwise": (sources, layers),
        "inner": (sources, layers),
        "distances": (sources, sources),
    }
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


@dataclass
class _Run:
    """The measuring, as steps that add to `sums`; `loaded` is whose weights the network has."""

    problem: Problem
    network: Network
    learned: Sequence[str]
    layers: Sequence[str]
    batch_size: int
    sums: dict[str, Tensor]
    loaded: str | None = None

    def work(self) -> Iterator[Callable[[], None]]:
        """The steps, always the same ones in the same order."""
        sources = list(self.problem.sources)
        for name in sources:
            examples = self.problem.calibration.of(name)
            for start in range(0, len(examples), _EXAMPLES_A_SAVE):
                yield partial(self._sense, name, examples[start : start + _EXAMPLES_A_SAVE])
        for name in sources if len(sources) > 1 else []:
            for chunk in self._chunks(self.problem.calibration.of(name)):
                yield partial(self._compare, name, chunk)

    def _load(self, source: str) -> None:
        """Make the network a source."""
        if self.loaded == source:
            return
        self.network.become(self.problem.sources[source], self.learned)
        self.loaded = source

    def _sense(self, source: str, examples: Sequence[Example]) -> None:
        """Add the sensitivities on some of a source's examples."""
        self._load(source)
        model, row = self.problem.sources[source], list(self.problem.sources).index(source)
        columns = {name: self.layers.index(layer_name(name)) for name in self.learned}

        def take(name: str, gradient: Tensor) -> None:
            if name in columns:
                products = self.problem.weight(model, name).mul_(gradient)
                inner = products.sum(dtype=torch.float64).abs()
                self.sums["inner"][row, columns[name]] += inner.cpu()
                absolute = products.abs_().sum(dtype=torch.float64)
                self.sums["elementwise"][row, columns[name]] += absolute.cpu()

        with self.network.gradients(take):
            for example in examples:
                one = batch([example]).to(self.problem.device)
                logits = self.network.logits(one)[one.counted]
                loss = torch.nn.functional.cross_entropy(logits, one.targets[one.counted])
                self.network.backward(loss, one, what=f"sensitivity of source {source!r}")

    @torch.no_grad()
    def _compare(self, expert: str, examples: Sequence[Example]) -> None:
        """Add the distances of all sources' logits to one's, on some of its examples."""
        self._load(expert)
        cut = [b.to(self.problem.device) for b in batches(examples, self.batch_size)]
        own = [self.network.logits(b)[b.counted] for b in cut]
        sources = list(self.problem.sources)
        for row, source in enumerate(sources):
            if source == expert:
                continue
            self._load(source)
            for one, theirs in zip(cut, own, strict=True):
                apart = (self.network.logits(one)[one.counted] - theirs).norm(dim=-1).double()
                by_example = apart.split(one.counted.sum(1).tolist())
                total = torch.stack([tokens.mean() for tokens in by_example]).sum()
                self.sums["distances"][row, sources.index(expert)] += total.cpu()

    def _chunks(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        """Runs of examples whose logits can be held together, whole batches each."""
        size = int(self.network.model.get_input_embeddings().num_embeddings) * 4
        chunk: list[Example] = []
        for start in range(0, len(examples), self.batch_size):
            following = examples[start : start + self.batch_size]
            held = sum(len(e.predicted) for e in (*chunk, *following)) * size
            if chunk and held > _HELD_BYTES:
                yield chunk
                chunk = []
            chunk = [*chunk, *following]
        yield chunk
