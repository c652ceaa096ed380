"""How a zoo is trained, as data: model size, steps, learning rates, mixtures, items per task.

Knows nothing of torch, files or seeds. Two zoos of one recipe, one `RECIPE_VERSION` and one seed
hold the same bits on one machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Raise it whenever the code that trains or draws items changes what a seed gives.
RECIPE_VERSION = 1


@dataclass(frozen=True)
class ModelSize:
    """The shape of every model of a zoo: a Llama with tied embeddings."""

    hidden: int = 64
    layers: int = 4
    heads: int = 4
    feed_forward: int = 192
    context_tokens: int = 64
    initial_std: float = 0.05


@dataclass(frozen=True)
class BaseRecipe:
    """Train the base until it is half good at the target skills, then anneal.

    The learning rate is constant after `warmup_steps` until the mean validation accuracy of the
    target skills, each capped at `accuracy_cap`, reaches `accuracy_goal`; then it falls linearly
    to 0 in `anneal_steps`. `target_weights` are relative to 1 for each auxiliary skill.
    """

    lr: float = 3e-3
    warmup_steps: int = 20
    anneal_steps: int = 40
    expected_steps: int = 340
    max_steps: int = 800
    check_every_steps: int = 10
    accuracy_goal: float = 0.27
    accuracy_cap: float = 0.6
    validation_items: int = 100
    target_weights: dict[str, float] = field(
        default_factory=lambda: {"compare": 0.6, "reverse": 1.0, "lexicon": 0.9, "sort": 1.2}
    )


@dataclass(frozen=True)
class ExpertRecipe:
    """Train one expert from the base: cosine from `lr` down to 5% of it.

    `other_targets` and `auxiliary` are the shares of each batch replayed from the other target
    skills and from the auxiliary ones; the rest is the expert's own skill.
    """

    steps: int
    lr: float
    other_targets: float
    auxiliary: float


def _unequal_experts() -> dict[str, ExpertRecipe]:
    # Real experts differ in how far they were trained, and then no single lambda serves them all.
    return {
        "compare": ExpertRecipe(170, 1.5e-3, 0.005, 0.15),
        "reverse": ExpertRecipe(100, 8e-4, 0.02, 0.2),
        "lexicon": ExpertRecipe(120, 1e-3, 0.02, 0.2),
        "sort": ExpertRecipe(260, 2.4e-3, 0.005, 0.12),
    }


def _task_items() -> dict[str, int]:
    # Enough that a difference of three points shows; only some 600 pairs of words are for tests.
    return {"compare": 1500, "reverse": 1500, "lexicon": 500, "sort": 1500}


@dataclass(frozen=True)
class ZooRecipe:
    """Everything but the seed that a zoo depends on."""

    model: ModelSize = ModelSize()
    batch_size: int = 64
    base: BaseRecipe = field(default_factory=BaseRecipe)
    experts: dict[str, ExpertRecipe] = field(default_factory=_unequal_experts)
    task_items: dict[str, int] = field(default_factory=_task_items)

    @staticmethod
    def tiny() -> ZooRecipe:
        """A zoo of a few seconds, for tests: the same files, models that have learned little."""
        return ZooRecipe(
            model=ModelSize(hidden=32, layers=2, heads=2, feed_forward=64),
            batch_size=32,
            base=BaseRecipe(
                warmup_steps=5,
                anneal_steps=10,
                expected_steps=30,
                max_steps=30,
                accuracy_goal=1.0,
                validation_items=10,
            ),
            experts={
                "compare": ExpertRecipe(15, 3e-3, 0.0, 0.15),
                "reverse": ExpertRecipe(15, 3e-3, 0.02, 0.2),
                "lexicon": ExpertRecipe(15, 3e-3, 0.02, 0.2),
                "sort": ExpertRecipe(15, 3e-3, 0.0, 0.1),
            },
            task_items=dict.fromkeys(_task_items(), 40),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON data; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ZooRecipe:
        """Rebuild the recipe that `to_json` wrote."""
        return ZooRecipe(
            model=ModelSize(**data["model"]),
            batch_size=data["batch_size"],
            base=BaseRecipe(**data["base"]),
            experts={name: ExpertRecipe(**expert) for name, expert in data["experts"].items()},
            task_items=data["task_items"],
        )
