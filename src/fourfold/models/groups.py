"""Parameter groups for the optimizer: weight decay and LoRA+."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fourfold.config.training import TrainingConfig
from fourfold.config.tuning import TuningConfig

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Parameters that are not decayed, by name (transformers.Trainer.get_decay_parameter_names)."""


def parameter_groups(model: nn.Module, training: TrainingConfig, tuning: TuningConfig) -> list[dict[str, Any]]:
    """The trained parameters as groups for a torch optimizer, each with `name`, `params`, `lr` and `weight_decay`.

    With `loraplus_lr_ratio` the B matrices (and every one-dimensional parameter) learn by that factor faster, and
    the B matrices of embedding adapters at `loraplus_lr_embedding` (arXiv 2402.12354). Empty groups are left out.
    """
    layer_norms = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    ratio = tuning.loraplus_lr_ratio
    rates = {"": training.learning_rate, "lora_b": training.learning_rate * (ratio or 1.0)}
    rates["embedding"] = tuning.loraplus_lr_embedding
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = name not in layer_norms and _NO_DECAY.search(name) is None
        role = _loraplus_role(name, parameter) if ratio is not None else ""
        key = "_".join(part for part in (role, "decay" if decayed else "no_decay") if part)
        decay = training.weight_decay if decayed else 0.0
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rates[role], "weight_decay": decay})
        group["params"].append(parameter)
    order = [f"{role}_{kind}".lstrip("_") for role in rates for kind in ("decay", "no_decay")]
    return [groups[key] for key in order if key in groups]


def _loraplus_role(name: str, parameter: nn.Parameter) -> str:
    if "lora_embedding_B" in name:
        return "embedding"
    return "lora_b" if "lora_B" in name or parameter.ndim == 1 else ""
