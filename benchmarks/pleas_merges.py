"""Two networks of one seed, merged in every way that `pleas.py` compares; what each way scores.

Knows nothing of other seeds and of the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from kept import Kept
from pleas_digits import EPOCHS, NETWORKS, Part, accuracy, parents, parts, train
from torch import Tensor, nn

from evomerge.merging.structure.networks.merge import MergedNetwork, Refitting, merged_network
from evomerge.merging.structure.networks.pair import Likeness, NetworkPair, matched
from evomerge.merging.structure.networks.pleas_networks import (
    Amount,
    Worth,
    allocated,
    measured_worth,
)
from evomerge.merging.structure.partial.budget import scaled
from evomerge.merging.structure.refit.least_squares import Data, LeastSquaresSettings
from evomerge.merging.structure.tracing.tracer import traced_spec
from evomerge.sampling.base import Told
from evomerge.sampling.cmaes import cmaes_sampler
from evomerge.spec import SamplerSpec

CALIBRATION = 300  # images of each domain
SIZES = (10, 30, 100, 300, 1000)
MATCHINGS: Mapping[str, Likeness] = {
    "average": "identity",
    "permuted by weights": "weights",
    "permuted by activations": "distance",
}
PERMUTED = "permuted by activations"
AS_IT_IS, RESET = "as it is", "BN reset"
PUBLISHED, REGMEAN = "least squares (published)", "least squares on separate rows"
SEQUENTIAL, OWN = "sequential", "sequential, own targets"
FORMS: Mapping[str, Refitting] = {
    AS_IT_IS: Refitting(least_squares=None, normalization="kept"),
    RESET: Refitting(least_squares=None),
    REGMEAN: Refitting(least_squares=LeastSquaresSettings(form="separate")),
    PUBLISHED: Refitting(),
    SEQUENTIAL: Refitting(least_squares=LeastSquaresSettings(form="sequential")),
    OWN: Refitting(
        least_squares=LeastSquaresSettings(form="sequential", targets="own"), normalization="kept"
    ),
}
CURVED = (PUBLISHED, SEQUENTIAL, OWN)
BUDGETS = (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0)
PROGRAMME, UNIFORM, PREFIX = "programme", "uniform", "prefix"
ALLOCATIONS = (PROGRAMME, UNIFORM, PREFIX)
SEARCHED_AT, SEARCHED = 1.4, (PUBLISHED,)
OTHER_DATA = ("domain A alone", "domain B alone", "smooth noise", "white noise")


class Merges:
    """All that is measured on networks of one kind and seed; kept in `folder`."""

    def __init__(self, kind: str, seed: int, folder: Path, epochs: int | None = None) -> None:
        self.kind, self.seed, self.epochs = kind, seed, epochs or EPOCHS[kind]
        self.a, self.b = parents(kind, seed, folder, epochs)
        self.parts = parts(seed)
        self._kept = Kept(folder / f"{kind}-{seed}.jsonl")
        self._pairs: dict[Any, NetworkPair] = {}

    def baselines(self) -> dict[str, float]:
        """Accuracies of what is no merge."""
        return self._kept.get("baselines", self._baselines)

    def at_one(self) -> dict[str, dict[str, float]]:
        """As large as one network, by matching and by form."""
        return {name: {form: self._score(name, form) for form in FORMS} for name in MATCHINGS}

    def curve(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Cost and accuracy at every budget, by form and allocation."""
        return {
            form: {how: [self._at(form, how, b) for b in BUDGETS] for how in ALLOCATIONS}
            for form in CURVED
        }

    def sizes(self) -> dict[str, list[float]]:
        """As large as one network, by how many images of each domain there are for it."""
        return {form: [self._of_size(form, size) for size in SIZES] for form in CURVED}

    def other_data(self) -> dict[str, dict[str, float]]:
        """As large as one network, on data that is not of both tasks (PLeaS-free)."""
        forms = (PUBLISHED, SEQUENTIAL)
        return {name: {form: self._on(form, name) for form in forms} for name in OTHER_DATA}

    def search(self, trials: int) -> dict[str, dict[str, Any]]:
        """Accuracies on both parts by form and by who says what stays apart."""
        return {form: self._arms(form, trials) for form in SEARCHED}

    @torch.no_grad()
    def _baselines(self) -> dict[str, float]:
        a, b, part = self.a, self.b, self.parts["report"]
        again = NETWORKS[self.kind]()
        images = self.parts["train"].first(CALIBRATION)
        with torch.enable_grad():
            train(again, images.both, images.labels.repeat_interleave(2), self.epochs)
        own = [accuracy(model, Part(x, x, part.labels))
               for model, x in ((a, part.a), (b, part.b))]  # fmt: skip
        return {
            "parents, each on its own domain": sum(own) / 2,
            "parents, on both": (accuracy(a, part) + accuracy(b, part)) / 2,
            "ensemble (logits), twice the cost": accuracy(_Sum(a, b), part),
            "ensemble (probabilities), twice the cost": accuracy(_Sum(a, b, soft=True), part),
            "trained on the calibration images, with labels": accuracy(again.eval(), part),
        }

    def _score(self, matching: str, form: str) -> float:
        def make() -> float:
            pair = self.pair(MATCHINGS[matching], self.data(CALIBRATION))
            return self._accuracy(merged_network(pair, {}, self._for(form), FORMS[form]))

        return self._kept.get(f"{matching}, {form}", make)

    def _at(self, form: str, how: str, budget: float) -> tuple[float, float]:
        if budget in (BUDGETS[0], BUDGETS[-1]):
            how = UNIFORM  # nothing apart, or everything

        def make() -> tuple[float, float]:
            apart = self.apart(how, budget)
            found = merged_network(self.permuted, apart, self._for(form), FORMS[form])
            return found.report.cost, self._accuracy(found)

        return tuple(self._kept.get(f"{form}, {how} {budget}", make))

    def _of_size(self, form: str, size: int) -> float:
        def make() -> float:
            pair = self.pair("distance", self.data(size))
            return self._accuracy(merged_network(pair, {}, self._for(form, size), FORMS[form]))

        return self._kept.get(f"{form} of {size}", make)

    def _on(self, form: str, name: str) -> float:
        def make() -> float:
            data = Data([self._images(name)])
            pair = self.pair("distance", data)
            return self._accuracy(merged_network(pair, {}, data, FORMS[form]))

        return self._kept.get(f"{form} on {name}", make)

    def _images(self, name: str) -> Tensor:
        part = self.parts["train"].first(CALIBRATION)
        if name.startswith("domain"):
            return part.a if "A" in name else part.b
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(2 * CALIBRATION, 1, 8, 8, generator=generator)
        if name == "smooth noise":
            noise = nn.functional.avg_pool2d(noise, 3, 1, 1, count_include_pad=False)
        return part.both.std() * noise / noise.std()

    @cached_property
    def permuted(self) -> NetworkPair:
        return self.pair("distance", self.data(CALIBRATION))

    @cached_property
    def _spec(self) -> Any:
        return traced_spec(self.a, self._example)

    @property
    def _example(self) -> Tensor:
        return self.parts["train"].a[:2]

    def pair(self, similarity: Likeness, data: Data) -> NetworkPair:
        return matched(
            self.a, self.b, data, example=(self._example,), similarity=similarity, spec=self._spec
        )

    def data(self, size: int) -> Data:
        """Images of both domains by turns, in one batch."""
        return Data([self.parts["train"].first(size).both])

    def _for(self, form: str, size: int | None = None) -> Data:
        size = size or CALIBRATION
        if form != OWN:
            return self.data(size)
        part = self.parts["train"].first(size)
        return Data(a=[part.a], b=[part.b])

    @cached_property
    def worth(self) -> Worth:
        def make() -> list[Any]:
            data = self.data(CALIBRATION)
            found = measured_worth(self.permuted, data, self._selected)
            return [found.merged, found.separate, found.merged_except, found.separate_except]

        return Worth(*self._kept.get("worth", make))

    def apart(self, how: str, budget: float) -> dict[str, int]:
        """What stays apart; a budget that no network of this kind reaches is the largest one."""
        amount = Amount(budget=min(budget, self.permuted.costs.maximum), allocation=how)
        return allocated(self.permuted, amount, self.worth if how == PROGRAMME else None)

    def _arms(self, form: str, trials: int) -> dict[str, Any]:
        def rules() -> dict[str, Any]:
            return {how: self._both(form, self.apart(how, SEARCHED_AT)) for how in ALLOCATIONS}

        def found(start: str) -> dict[str, float]:
            return self._both(form, self._searched(form, trials, start))

        arms: dict[str, Any] = dict(self._kept.get(f"rules, {form}", rules))
        for start in (UNIFORM, PROGRAMME):
            key = f"search from {start}, {form} {trials}"
            arms[f"search from {start}"] = self._kept.get(key, partial(found, start))
        return arms

    def _both(self, form: str, apart: Mapping[str, int]) -> dict[str, float]:
        network = merged_network(self.permuted, apart, self._for(form), FORMS[form]).network
        return {name: accuracy(network, self.parts[name]) for name in ("selection", "report")}

    def _searched(self, form: str, trials: int, start: str) -> dict[str, int]:
        """CMA-ES over a share for each group, from those of a rule on; the best on selection."""
        costs, found = self.permuted.costs, list[tuple[float, dict[str, int]]]()
        apart = self.apart(start, SEARCHED_AT)
        init = [apart[name] / self.permuted.spec[name].size for name in costs.groups]
        spec = SamplerSpec(seed=self.seed, sigma0=0.3 if start == UNIFORM else 0.15)
        if start == UNIFORM:
            init = [0.5] * len(init)
        sampler = cmaes_sampler(spec, init=init, objectives=1, init_first=True)
        for index in range(trials):
            genome = sampler.ask(index)
            shares = dict(zip(costs.groups, genome, strict=True))
            apart = scaled(costs, SEARCHED_AT, shares)
            network = merged_network(self.permuted, apart, self._for(form), FORMS[form]).network
            found.append((self._selected(network), apart))
            sampler.tell(Told(index, genome, (found[-1][0],)))
        return max(found, key=lambda one: one[0])[1]

    def _selected(self, model: nn.Module) -> float:
        return accuracy(model, self.parts["selection"])

    def _accuracy(self, merged: MergedNetwork) -> float:
        return accuracy(merged.network, self.parts["report"])


class _Sum(nn.Module):
    """Two networks side by side."""

    def __init__(self, a: nn.Module, b: nn.Module, *, soft: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.soft = a, b, soft

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x), self.b(x)
        found: Tensor = one.softmax(1) + two.softmax(1) if self.soft else one + two
        return found
