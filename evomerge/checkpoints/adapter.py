"""Read a LoRA adapter that PEFT wrote: low-rank factors and whole tensors, by module.

Knows the files and what each key of them means, not the base they belong to: that is `adapted`.
Never unpickles anything and never imports peft.

Source: peft 0.21, `tuners/lora/layer.py` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.checkpoints.files import find_folder
from evomerge.errors import CheckpointError, PickleRefused

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a module's name in the keys of the weights file."""

_PICKLE = "adapter_model.bin"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.weight)?"
)
_WHOLE = re.compile(r".+\.(weight|bias)")
# Settings under which the same factors mean something else, or more than a sum.
_UNSUPPORTED = (
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "velora_config",
)
# Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights before training.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one module: scale · B A, with DoRA also the norms of the rows.

    Shapes: a [r, in], b [out, r], magnitude [out]. A module of E experts has a [E·r, in], expert by
    expert, and b [out, r·E], rank by rank. The factors of an embedding multiply to its transpose.
    """

    module: str
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return self.b.shape[1]


@dataclass(frozen=True)
class Settings:
    """The part of `adapter_config.json` that changes values."""

    r: int
    lora_alpha: float
    base: str | None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()

    def rank(self, module: str) -> int:
        """The rank that the config gives a module."""
        return int(self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r))

    def scale(self, module: str) -> float:
        """What multiplies B A: alpha / r, or alpha / √r for rsLoRA."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha)
        r = self.rank(module)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


class Adapter:
    """A LoRA adapter on disk. `path` is what the user called it, `folder` where it lies."""

    def __init__(
        self, path: str, folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        self.path = path
        self.folder = folder
        self.config = config
        self.settings = _settings(path, config)
        self._weights = weights

    @classmethod
    def open(cls, path: str) -> Adapter:
        """Open a folder, or an adapter on the hub by its id.

        Raises CheckpointError for an adapter that is broken or of another kind than LoRA, naming
        the file, the kind or the setting; PickleRefused.
        """
        folder = find_folder(path)
        return cls(path, folder, _read_config(folder), _read_weights(folder))

    @cached_property
    def factors(self) -> Mapping[str, Factors]:
        """Low-rank factors by module. Of two on one module's parameters, the inner one's module
        ends in `.base_layer`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._weights.items():
            if match := _FACTOR.fullmatch(key):
                parts.setdefault(match["module"], {})[match["part"]] = tensor
        return {module: self._factors(module, found) for module, found in sorted(parts.items())}

    @cached_property
    def whole(self) -> Mapping[str, Tensor]:
        """Tensors that replace the base's, by name: modules_to_save, biases, saved embeddings."""
        found = {}
        for key, tensor in self._weights.items():
            if _FACTOR.fullmatch(key):
                continue
            if not _WHOLE.fullmatch(key) or ".lora_" in key:
                raise CheckpointError(f"{self.path}: {key} is not a tensor of a LoRA adapter")
            found[key.replace(".base_layer.", ".")] = tensor
        return found

    @cached_property
    def copies(self) -> frozenset[str]:
        """Those of `whole` that are weights beneath factors: PEFT saves an adapted embedding."""
        return frozenset(
            key.replace(".base_layer.", ".")
            for key in self._weights
            if key.endswith(".base_layer.weight")
        )

    def _factors(self, module: str, parts: Mapping[str, Tensor]) -> Factors:
        is_embedding = "lora_embedding_A" in parts
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        if missing := [name for name in names if name not in parts]:
            raise CheckpointError(
                f"{self.path}: {module} has no {missing[0]}; download the adapter again"
            )
        a, b = (parts[name] for name in names)
        if a.dim() != 2 or b.dim() != 2:
            raise CheckpointError(
                f"{self.path}: {module} has factors of {a.dim()} and {b.dim()} dimensions; only"
                " those of linear layers and embeddings are supported, not of convolutions"
            )
        magnitude = parts.get("lora_magnitude_vector")
        if self.settings.use_dora and magnitude is None:
            raise CheckpointError(
                f"{self.path}: {module} has no lora_magnitude_vector, which DoRA needs; download"
                " the adapter again"
            )
        self._check_rank(module, a, b)
        magnitude = None if magnitude is None else magnitude.reshape(-1)
        return Factors(module, a, b, self.settings.scale(module), magnitude, is_embedding)

    def _check_rank(self, module: str, a: Tensor, b: Tensor) -> None:
        rank = self.settings.rank(module)
        # With target_parameters a module's factors may hold several experts.
        if a.shape[0] != b.shape[1] or (a.shape[0] != rank and not self.settings.target_parameters):
            raise CheckpointError(
                f"{self.path}: {module} has factors {list(a.shape)} and {list(b.shape)}, the config"
                f" gives it rank {rank}; download the adapter again"
            )


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first of the config's patterns that names a module, by PEFT's rule."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), "")


def _settings(path: str, config: Mapping[str, Any]) -> Settings:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: is a {kind} adapter; only LoRA adapters are supported")
    if used := [name for name in _UNSUPPORTED if config.get(name)]:
        raise CheckpointError(f"{path}: uses {used[0]}, which is not supported; merge it with peft")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: was trained on a base that {config['init_lora_weights']} had changed; convert"
            " it into a plain LoRA (peft: save_pretrained with"
            " path_initial_model_for_weight_conversion)"
        )
    if missing := [name for name in ("r", "lora_alpha") if not config.get(name)]:
        raise CheckpointError(f"{path}: {ADAPTER_CONFIG} lacks {missing[0]}")
    return Settings(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        base=config.get("base_model_name_or_path"),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        target_parameters=tuple(config.get("target_parameters") or ()),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {ADAPTER_CONFIG}, so it is no adapter") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(document).__name__}")
    return document


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors by key, PEFT's prefix taken off."""
    path = folder / ADAPTER_WEIGHTS
    if not path.exists() and (folder / _PICKLE).exists():
        raise PickleRefused(
            f"{folder / _PICKLE}: a pickle can run code when it is loaded and is refused. On a"
            " machine where you trust it, convert it: load the adapter with peft and"
            " save_pretrained(NEW)"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; an adapter needs it")
    try:
        file: Any = safe_open(path, framework="pt")
        tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); download or save it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensor")
    return tensors
