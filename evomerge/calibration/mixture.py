"""A recipe file of a mixture, opened: models on disk and the tokens of its prompts.

Knows nothing of how a mixture is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evomerge.calibration.request import tokenizer_of
from evomerge.checkpoints.adapted import open_models
from evomerge.errors import SpecError
from evomerge.merging.structure.mixture.export import MixtureProblem
from evomerge.merging.structure.mixture.gates import Prompts
from evomerge.merging.structure.mixture.recipe import MixtureExpert, MixtureRecipe, load_mixture


def open_mixture_problem(path: Path, *, device: str) -> MixtureProblem:
    """The models opened, the prompts tokenised. Raises SpecError with every problem of the file,
    UserError for a model that cannot be had."""
    recipe = load_mixture(path)
    asked = [recipe.base_model, *(each.model for each in (*recipe.experts, *recipe.shared_experts))]
    models = open_models(asked)
    base = models[recipe.base_model]
    gated = [*recipe.experts, *filter(None, [recipe.gated_shared])]
    return MixtureProblem(
        recipe,
        base,
        [models[expert.model] for expert in recipe.experts],
        models[recipe.shared.model] if recipe.shared else None,
        _prompts(recipe, gated, tokenizer_of(base) if recipe.needs_prompts else None, path),
        device,
    )


def _prompts(
    recipe: MixtureRecipe, experts: Iterable[MixtureExpert], tokenizer: Any, path: Path
) -> list[Prompts]:
    """Tokens of each expert's prompts; none where the router is random.

    A prompt is the text after the tokenizer's first token, if it has one, as mergekit has it.
    """
    if not recipe.needs_prompts:
        return [Prompts(()) for _ in experts]

    def tokens(prompts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(_tokens(tokenizer, prompt, path) for prompt in prompts)

    return [Prompts(tokens(e.positive_prompts), tokens(e.negative_prompts)) for e in experts]


def _tokens(tokenizer: Any, prompt: str, path: Path) -> tuple[int, ...]:
    found = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False).input_ids
    if not found:
        raise SpecError(str(path), [f"the prompt {prompt!r} has no tokens"])
    return tuple(found)
