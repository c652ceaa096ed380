"""Load a checkpoint that holds fewer experts than its routers choose among.

Its config names the model that it was made from (`remapped_model_type`), and holds for each layer
of experts, in order of depth, which stored expert stands for each that the router knows
(`expert_map`). The loaded model is transformers' own, with the tables put between routers and
experts; where the router chooses two that became one, their contributions add. Layers that it names
under `compressed_layers` have their experts in a file of their own, as U V + S.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import CheckpointError
from evomerge.merging.structure.experts.compressed_experts import hollow, install, shapes_of
from evomerge.merging.structure.experts.compressed_model import COMPRESSED_FILE, COMPRESSED_LAYERS
from evomerge.merging.structure.experts.plan import REMAPPED
from evomerge.merging.structure.experts.watch import one_hot


def load_remapped(
    path: str | Path, *, dtype: torch.dtype | str = "auto", dense: bool = False, **options: Any
) -> nn.Module:
    """A language model in evaluation mode, from a folder that the remapped form was written
    to. It computes what the replicated form does, from fewer weights: bit for bit where each token
    is multiplied alone (`experts_implementation="batched_mm"`) and weights are aligned alike in
    memory, else but for the rounding of matrix products, which now run over more rows at once.

    Compressed experts compute (U V + S) x; with `dense` they become whole matrices in memory, which
    is faster, and no smaller than before the compression.

    `options` are those of transformers' `from_pretrained`. Code that comes with a checkpoint is
    never run. Raises CheckpointError for a folder of another form, or without some of its tensors.
    """
    folder = Path(path)
    config = _config(folder)
    compressed = getattr(config, COMPRESSED_LAYERS, ())
    if compressed and not dense:
        options = _eager(options)
    made = _remapped_class(type(config), hollowed=bool(compressed) and not dense)
    loaded: tuple[Any, dict[str, Any]] = made.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    model, info = loaded
    if lost := sorted(map(str, info.get("missing_keys") or ())):
        raise CheckpointError(f"{folder}: has no tensor for {lost[0]}; export it again")
    if compressed:
        install(model, model.compressed_shapes, folder / COMPRESSED_FILE, dense=dense)
    result: nn.Module = model.eval()
    return result


def _eager(options: Mapping[str, Any]) -> dict[str, Any]:
    """Only this implementation multiplies by one expert's matrix at a time."""
    chosen = options.get("experts_implementation", "eager")
    if chosen != "eager":
        raise CheckpointError(
            f"experts_implementation: {chosen!r} needs whole matrices; load with `dense=True`"
        )
    return {**options, "experts_implementation": "eager"}


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    if document.pop("model_type", None) != REMAPPED or "expert_map" not in document:
        raise CheckpointError(
            f"{folder}: its experts are not remapped; load it by transformers' AutoModelForCausalLM"
        )
    try:
        return AutoConfig.for_model(document["remapped_model_type"], **document)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error


def _remapped_class(config_type: type, *, hollowed: bool) -> Any:
    """transformers' own class for a config, whose experts are as many as the checkpoint holds.

    Those that are compressed are empty if `hollowed`; `compressed_shapes` are their tensors' shapes
    by the live names of their layers.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForCausalLM
    if config_type not in auto._model_mapping:
        auto = AutoModelForSeq2SeqLM
    base: Any = auto._model_mapping[config_type]

    def __init__(self: Any, config: Any) -> None:
        base.__init__(self, config)
        remap(self, config.expert_map)
        layers = _expert_modules(self)
        apart = [layers[at] for at in getattr(config, COMPRESSED_LAYERS, ())]
        self.compressed_shapes = {name: shapes_of(module) for name, module in apart}
        if hollowed:
            for _, module in apart:
                hollow(module)
        elsewhere = [
            f"^{re.escape(f'{name}.{key}')}$"
            for name, shapes in self.compressed_shapes.items()
            for key in shapes
        ]
        self._keys_to_ignore_on_load_missing |= set(elsewhere)

    return type(f"Remapped{base.__name__}", (base,), {"__init__": __init__})


def remap(model: nn.Module, tables: Sequence[Sequence[int]]) -> None:
    """Give every layer of experts of a live model as many as its table [E] speaks of, with no
    values yet, and send to them what the router sends to the E that it knows.

    Raises CheckpointError where the tables are not those of this model's layers.
    """
    layers = _expert_modules(model)
    if [len(table) for table in tables] != [module.num_experts for _, module in layers]:
        raise CheckpointError(
            f"expert_map: tables of {[len(t) for t in tables]} experts for layers of"
            f" {[module.num_experts for _, module in layers]}"
        )
    for table, (_, module) in zip(tables, layers, strict=True):
        _shrink(module, max(table) + 1)
        targets = torch.tensor(list(table), device="cpu")
        module.register_forward_pre_hook(partial(_redirect, targets), with_kwargs=True)


def _expert_modules(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if _is_experts(module)]


def _is_experts(module: Any) -> bool:
    """transformers keeps the experts of a layer as tensors with one row for each; Switch's as as
    many modules."""
    count = getattr(module, "num_experts", None)
    if isinstance(module, nn.ModuleDict):
        return len(module) == count
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.ndim == 3 and len(p) == count for p in own)


def _shrink(module: Any, count: int) -> None:
    if isinstance(module, nn.ModuleDict):
        for name in list(module)[count:]:
            del module[name]
    for name, parameter in list(module.named_parameters(recurse=False)):
        fewer = parameter.new_empty(count, *parameter.shape[1:])
        setattr(module, name, nn.Parameter(fewer, requires_grad=parameter.requires_grad))
    module.num_experts = count


def _redirect(
    targets: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """transformers' experts are called with (hidden states, top-k indices, top-k gate values);
    those of Switch with indices as 0 and 1, [n, 1, E]."""
    rows, chosen, *rest = (*args, *kwargs.values())
    targets = targets.to(chosen.device)
    if one_hot(chosen, len(targets)):
        fewer = chosen.new_zeros(*chosen.shape[:2], int(targets.max()) + 1)
        return (rows, fewer.index_add(2, targets, chosen), *rest), {}
    return (rows, targets[chosen], *rest), {}
