"""PiSSA: adapters that start from the principal components of the weights (arXiv 2404.02948).

PEFT takes the components s B0 A0 out of the base weight W, so that W - s B0 A0 + s B A is trained. An adapter that is
to fit the unchanged W must carry both: s B A - s B0 A0 = s [B, -B0] [A; A0], a plain LoRA adapter of twice the rank.
That is the form written to disk, always, since the other needs the very same decomposition to be made again on load.
The starting values live in the model as a second, frozen adapter.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from fourfold.base.peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

ADAPTER = "default"
START = "pissa_start"
"""Name of the adapter that holds A0 and B0."""


def init_name(iterations: int) -> str:
    """PEFT's name of the initialisation: the exact decomposition for -1, else the fast one with so many iterations."""
    return "pissa" if iterations == -1 else f"pissa_niter_{iterations}"


def keep_start(model: PeftModel) -> None:
    """Remember the values that the adapter starts from; call right after it was made."""
    start = copy.deepcopy(model.peft_config[ADAPTER])
    assert isinstance(start, LoraConfig)
    start.init_lora_weights = True
    start.modules_to_save = None
    model.add_adapter(START, start)
    values = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    lora_only = {name: tensor.clone() for name, tensor in values.items() if _is_lora(name)}
    set_peft_model_state_dict(model, lora_only, adapter_name=START)
    model.set_adapter(ADAPTER)


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def is_pissa(model: PeftModel) -> bool:
    """Whether the model's adapter was made by PiSSA."""
    return START in model.peft_config


def converted(model: PeftModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter as a plain one of the unchanged base: weights by PEFT's names, and its config."""
    trained = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    start = get_peft_model_state_dict(model, adapter_name=START, save_embedding_layers=False)
    weights: dict[str, Tensor] = {}
    for name, tensor in trained.items():
        if name.endswith(".lora_A.weight"):
            tensor = torch.cat([tensor, start[name].to(tensor.dtype)], dim=0)
        elif name.endswith(".lora_B.weight"):
            tensor = torch.cat([tensor, -start[name].to(tensor.dtype)], dim=1)
        weights[name] = tensor.contiguous()
    config = copy.deepcopy(model.peft_config[ADAPTER])
    assert isinstance(config, LoraConfig)
    # The scale alpha / r (alpha / sqrt(r) with rank stabilisation) must stay while the rank doubles.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * factor  # type: ignore[assignment]
    config.init_lora_weights = True
    return weights, config


def restore(model: PeftModel, weights: dict[str, Tensor]) -> list[str]:
    """Put saved adapter weights back into the adapter that they came from; returns names that it does not have.

    For PiSSA the start is not restored: a run with the same seed has made the same one.
    """
    if is_pissa(model):
        rank = model.peft_config[ADAPTER].r  # type: ignore[attr-defined]
        weights = {name: _trained_half(name, tensor, rank) for name, tensor in weights.items()}
    return list(set_peft_model_state_dict(model, weights, adapter_name=ADAPTER).unexpected_keys)


def _trained_half(name: str, tensor: Tensor, rank: int) -> Tensor:
    if name.endswith(".lora_A.weight"):
        return tensor[:rank]
    return tensor[:, :rank] if name.endswith(".lora_B.weight") else tensor
