"""Load a checkpoint that holds fewer experts than its routers choose among.

Its config names the model that it was made from (`remapped_model_type`), and holds for each layer
of experts, in order of depth, which stored expert stands for each that the router knows
(`expert_map`). The loaded model is transformers' own, with the tables put between routers and
experts; where the router chooses two that became one, their contributions add.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import CheckpointError
from evomerge.merging.structure.moe_plan import REMAPPED


def load_remapped(
    path: str | Path, *, dtype: torch.dtype | str = "auto", **options: Any
) -> nn.Module:
    """A causal language model in evaluation mode, from a folder that the remapped form was written
    to. It computes what the replicated form does, from fewer weights: bit for bit where each token
    is multiplied alone (`experts_implementation="batched_mm"`) and weights are aligned alike in
    memory, else but for the rounding of matrix products, which now run over more rows at once.

    `options` are those of transformers' `from_pretrained`. Code that comes with a checkpoint is
    never run. Raises CheckpointError for a folder of another form, or without some of its tensors.
    """
    folder = Path(path)
    config = _config(folder)
    loaded: tuple[nn.Module, dict[str, Any]] = _remapped_class(type(config)).from_pretrained(
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
    return model.eval()


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


def _remapped_class(config_type: type) -> Any:
    """transformers' own class for a config, whose experts are as many as the checkpoint holds."""
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM._model_mapping[config_type]

    def __init__(self: Any, config: Any) -> None:
        base.__init__(self, config)
        remap(self, config.expert_map)

    return type(f"Remapped{base.__name__}", (base,), {"__init__": __init__})


def remap(model: nn.Module, tables: Sequence[Sequence[int]]) -> None:
    """Give every layer of experts of a live model as many as its table [E] speaks of, with no
    values yet, and send to them what the router sends to the E that it knows.

    Raises CheckpointError where the tables are not those of this model's layers.
    """
    layers = [(name, module) for name, module in model.named_modules() if _is_experts(module)]
    if [len(table) for table in tables] != [module.num_experts for _, module in layers]:
        raise CheckpointError(
            f"expert_map: tables of {[len(t) for t in tables]} experts for layers of"
            f" {[module.num_experts for _, module in layers]}"
        )
    for table, (_, module) in zip(tables, layers, strict=True):
        _shrink(module, max(table) + 1)
        targets = torch.tensor(list(table), device="cpu")
        module.register_forward_pre_hook(partial(_redirect, targets), with_kwargs=True)


def _is_experts(module: Any) -> bool:
    """transformers keeps the experts of a layer as tensors with one row for each."""
    count = getattr(module, "num_experts", None)
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.ndim == 3 and len(p) == count for p in own)


def _shrink(module: Any, count: int) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        fewer = parameter.new_empty(count, *parameter.shape[1:])
        setattr(module, name, nn.Parameter(fewer, requires_grad=parameter.requires_grad))
    module.num_experts = count


def _redirect(
    targets: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """transformers' experts are called with (hidden states, top-k indices, top-k gate values)."""
    rows, chosen, *rest = (*args, *kwargs.values())
    return (rows, targets.to(chosen.device)[chosen], *rest), {}
