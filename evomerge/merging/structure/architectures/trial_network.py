"""A tiny network of an architecture, with random weights, on which its specification is proved.

Weights are handed in by their stored names; transformers' own conversion says where they land.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.errors import MergeError
from evomerge.merging.conversion import Part, places
from evomerge.merging.layout import tensor_type
from evomerge.merging.materialise import no_progress_bars
from evomerge.merging.structure.architectures.families import family, spec_of
from evomerge.merging.structure.permutations.check import FLOAT64, Report, check
from evomerge.merging.structure.permutations.permutation import Spec, State
from evomerge.merging.structure.permutations.units import Shapes

_REMOVED = (  # of the full size
    "layer_types", "quantization_config", "text_config_dict", "vision_config_dict",
)  # fmt: skip
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")  # beyond the tiny vocabulary


class TrialNetwork:
    """The model of a config, cut to a tiny size; `shapes` by stored name."""

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float64) -> None:
        self.model = _model(config).to(dtype).eval()
        self.model(**self._inputs(torch.Generator()))  # Switch's routers pick their dtype now
        self.config: dict[str, Any] = self.model.config.to_dict()
        self.shapes = _stored_shapes(self.model)
        live = {k: t.detach() for k, t in self.model.state_dict(keep_vars=True).items()}
        self._live = live
        self._parts: dict[str, tuple[Part, ...]] = places(self.model, self.shapes, live)

    @property
    def spec(self) -> Spec:
        """Its permutation groups."""
        return spec_of(self.config, self.shapes)

    def random_state(self, seed: int = 0) -> dict[str, Tensor]:
        """Weights that tell all units apart: matrices N(0, 1/fan-in), embeddings N(0, 1), biases
        and means U(-0.5, 0.5), other vectors U(0.5, 1.5). What a router adds to scores in [0, 1]
        is U(-0.15, 0.15), so that it does not choose the experts alone."""
        generator = torch.Generator().manual_seed(seed)
        return {name: self._draw(name, generator) for name in self.shapes}

    def _draw(self, name: str, generator: torch.Generator) -> Tensor:
        shape = self.shapes[name]
        dtype = self._live[self._parts[name][0].key].dtype
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        if len(shape) < 2:
            centre = 0.0 if name.endswith(("bias", "running_mean")) else 1.0
            width = 0.3 if name.endswith("correction_bias") else 1.0
            return width * (torch.rand(shape, generator=generator, dtype=dtype) - 0.5) + centre
        embeds = tensor_type(name) == "embedding"
        spread = 1.0 if embeds else math.sqrt(shape[0] / math.prod(shape))
        return torch.randn(shape, generator=generator, dtype=dtype) * spread

    def write(self, state: State) -> None:
        """Set the model's weights, given by their stored names."""
        for name, parts in self._parts.items():
            stored = state[name].contiguous().view(-1)
            for part in parts:
                flat = self._live[part.key].view(-1)
                live = flat.as_strided(part.sizes, part.live_strides, part.live_start)
                live.copy_(stored.as_strided(part.sizes, part.stored_strides, part.stored_start))

    def compute(self, state: State) -> Tensor:
        """Its logits on a few fixed random inputs."""
        self.write(state)
        output: Any = self.model(**self._inputs(torch.Generator().manual_seed(1)))
        logits: Tensor = output.logits if "logits" in output else output[0]
        return logits

    def _inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Whatever the model takes of pixels, words for an encoder and for a decoder."""
        config, takes = self.model.config, signature(self.model.forward).parameters
        inputs: dict[str, Tensor] = {}
        if "pixel_values" in takes:
            image = getattr(config, "vision_config", config)
            size = getattr(image, "image_size", 16)
            shape = 2, image.num_channels, size, size
            pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
            inputs["pixel_values"] = pixels.to(self.model.dtype)
        for name in ("input_ids", "decoder_input_ids"):
            if name in takes:
                words = config.get_text_config().vocab_size
                inputs[name] = torch.randint(1, words, (8, 16), generator=generator)
        if hasattr(config, "type_vocab_size"):
            inputs["token_type_ids"] = inputs["input_ids"] % 2
        return inputs


def prove(config: Mapping[str, Any]) -> Report:
    """Check the specification of a config's architecture on a tiny network of it, in float64.

    Raises MergeError where it has none, or one that is wrong for this config.
    """
    network = TrialNetwork(config)
    return check(network.spec, network.random_state(), network.compute, tolerance=FLOAT64)


def random_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """One tensor as in `TrialNetwork.random_state`; zeros where it is not one of floats."""
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    if len(shape) < 2:
        centre = 0.0 if name.endswith(("bias", "running_mean")) else 1.0
        return torch.rand(shape, generator=generator, dtype=dtype) + (centre - 0.5)
    embeds = tensor_type(name) == "embedding"
    spread = 1.0 if embeds else math.sqrt(shape[0] / math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=dtype) * spread


def _model(config: Mapping[str, Any]) -> Any:
    import transformers

    settings = {k: v for k, v in config.items() if k not in ("model_type", *_REMOVED)}
    settings = _settled(settings | dict.fromkeys(_TOKENS), family(config).tiny)
    architecture = next(iter(config.get("architectures") or ()), "")
    known = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    make = getattr(known, "_from_config", None) or known.from_config
    try:
        tiny = transformers.AutoConfig.for_model(config["model_type"], **settings)
        model = make(tiny, attn_implementation="eager")
    except Exception as error:  # whatever a config of transformers may raise
        raise MergeError(
            f"no tiny network of this config of {config['model_type']!r} can be built to prove its"
            f" permutation groups on: {' '.join(str(error).split())}"
        ) from error
    if hasattr(model, "set_experts_implementation"):  # others have no float64
        model.set_experts_implementation("eager")
    return model


def _settled(settings: Mapping[str, Any], tiny: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the tiny ones in place of the full, in nested configs too."""
    inner = {k: _settled(settings.get(k) or {}, v) for k, v in tiny.items() if isinstance(v, dict)}
    return {**settings, **tiny, **inner}


def _stored_shapes(model: Any) -> Shapes:
    with TemporaryDirectory() as folder, no_progress_bars():
        model.save_pretrained(folder)
        checkpoint = Checkpoint.open(folder)
        return {name: checkpoint.shape(name) for name in checkpoint.names}
