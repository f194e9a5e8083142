"""AdamW with decoupled weight decay (arXiv:1711.05101), PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fourfold.config.schema import Run


def build(groups: list[dict[str, Any]], model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """AdamW over parameter groups; fused on CUDA, for-each elsewhere."""
    training = run.training
    on_cuda = any(p.is_cuda for group in groups for p in group["params"])
    settings: dict[str, Any] = {
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "fused": on_cuda or None,
        **training.optim_args,
    }
    return torch.optim.AdamW(groups, lr=training.learning_rate, weight_decay=training.weight_decay, **settings)
