"""A recipe file that makes dense models the experts of a mixture; mergekit-moe's files too.

    base_model: org/base            # attention, norms, embeddings, head
    experts:
      - {model: org/math, positive_prompts: ["Prove that"], negative_prompts: ["def f("]}
      - {model: org/code, positive_prompts: ["def f("]}
    gate: hidden                    # hidden, hidden_last, hidden_avg, cheap_embed, random,
                                    # uniform_random; router_input (ours)
    experts_per_token: 2

Text only: opens no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evomerge.documents import read_yaml
from evomerge.errors import SpecError
from evomerge.merging.mergekit_stack import read_model
from evomerge.spec import nearest, problems

Target = Literal["mixtral", "qwen2_moe", "qwen3_moe"]

GATES = (
    "hidden",
    "hidden_last",
    "hidden_avg",
    "router_input",
    "cheap_embed",
    "random",
    "uniform_random",
)
RANDOM_GATES = ("random", "uniform_random")
ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen", "qwen3", "deepseek")
"""What `architecture` may be; the last three are mergekit's words."""

_MERGEKIT = {"gate_mode": "gate", "source_model": "model"}


class MixtureExpert(BaseModel):
    """A dense model whose MLPs become an expert of every layer.

    `noise_scale` is the deviation of normal noise on its weights, `residual_scale` a factor on what
    its MLPs add to the residual stream.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1)
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float = Field(default=0.0, ge=0)
    residual_scale: float = 1.0


class MixtureRecipe(BaseModel):
    """What a mixture is made of. Paths are absolute once `load_mixture` has read them.

    `attention` is where all that is no expert is from: the base, or the mean of the experts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = Field(min_length=1)
    experts: tuple[MixtureExpert, ...] = Field(min_length=1)
    shared_experts: tuple[MixtureExpert, ...] = ()
    gate: str = "hidden"
    architecture: str | None = None
    experts_per_token: int = Field(default=2, ge=1)
    attention: Literal["base", "mean"] = "base"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0

    @field_validator("gate")
    @classmethod
    def _known_gate(cls, gate: str) -> str:
        return _known(gate, GATES)

    @field_validator("architecture")
    @classmethod
    def _known_architecture(cls, architecture: str | None) -> str | None:
        return architecture if architecture is None else _known(architecture.lower(), ARCHITECTURES)

    @property
    def needs_prompts(self) -> bool:
        """Whether rows of the router come from prompts."""
        return self.gate not in RANDOM_GATES

    @property
    def shared(self) -> MixtureExpert | None:
        """The expert that every token goes to."""
        return self.shared_experts[0] if self.shared_experts else None

    @property
    def gated_shared(self) -> MixtureExpert | None:
        """The shared expert, if it has a gate with a row of its own; one without is always on."""
        shared = self.shared
        if shared is None or self.architecture == "deepseek":
            return None
        return shared if shared.positive_prompts or not self.needs_prompts else None

    def conflicts(self) -> list[str]:
        """What is wrong between settings, each of them being fine by itself; a line each."""
        faults, count = [], len(self.experts)
        if count < self.experts_per_token:
            faults.append(
                f"experts_per_token: {self.experts_per_token}, but there are {count} experts"
            )
        if len(self.shared_experts) > 1:
            faults.append("shared_experts: expected one at most")
        if self.architecture == "deepseek" and self.shared and self.shared.positive_prompts:
            faults.append(
                "shared_experts.0.positive_prompts: deepseek's have no gate; leave it out"
            )
        return faults + (self._prompt_faults() if self.needs_prompts else [])

    def _prompt_faults(self) -> list[str]:
        missing = [
            f"experts.{number}.positive_prompts: gate: {self.gate} needs at least one prompt"
            for number, expert in enumerate(self.experts)
            if not expert.positive_prompts
        ]
        said = {(expert.positive_prompts, expert.negative_prompts) for expert in self.experts}
        if not missing and len(self.experts) > 1 and len(said) == 1:
            return ["experts: all have the same prompts, so that no router can tell them apart"]
        return missing


def wants_mixture(path: Path) -> bool:
    """Whether a recipe file makes dense models the experts of a mixture: `experts` is a list."""
    document = read_yaml(path)
    return isinstance(document, Mapping) and isinstance(document.get("experts"), list)


def load_mixture(path: Path) -> MixtureRecipe:
    """Read a recipe file, ours or mergekit-moe's. Raises SpecError with every problem found."""
    document = read_yaml(path)
    assert isinstance(document, Mapping)  # as wants_mixture has found
    folder, faults = path.resolve().parent, list[str]()
    known = _renamed(document, "", faults)
    for key in ("experts", "shared_experts"):
        if isinstance(known.get(key), list):
            known[key] = [
                _expert(entry, f"{key}.{number}", folder, faults)
                for number, entry in enumerate(known[key])
            ]
    if "base_model" in known:
        known["base_model"] = _model("base_model", known["base_model"], folder, faults)
    try:
        recipe = MixtureRecipe.model_validate(known)
        faults += recipe.conflicts()
    except ValidationError as error:
        faults += problems(error, MixtureRecipe)
    if faults:
        raise SpecError(str(path), faults)
    return recipe


def _expert(entry: Any, where: str, folder: Path, faults: list[str]) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    known = _renamed(entry, f"{where}.", faults)
    if "model" in known:
        known["model"] = _model(f"{where}.model", known["model"], folder, faults)
    return known


def _renamed(document: Mapping[Any, Any], where: str, faults: list[str]) -> dict[str, Any]:
    """What is given, under our names of the keys; null is what mergekit writes for nothing."""
    known: dict[str, Any] = {}
    for key, value in document.items():
        ours = _MERGEKIT.get(key, str(key))
        if ours in known:
            faults.append(f"{where}{key}: is {where}{ours} in mergekit's words; give one of them")
        if value is not None:
            known[ours] = value
    return known


def _model(where: str, entry: Any, folder: Path, faults: list[str]) -> str:
    return read_model(where, entry, folder, faults) or "unknown"


def _known(word: str, words: tuple[str, ...]) -> str:
    if word not in words:
        raise ValueError(f"{word!r} is unknown{nearest(word, words)}")
    return word
