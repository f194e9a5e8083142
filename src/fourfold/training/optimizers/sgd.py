"""Plain stochastic gradient descent, PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fourfold.config.schema import Run


def build(groups: list[dict[str, Any]], model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """SGD over parameter groups, as Transformers' `optim: sgd`; optim_args adds momentum."""
    training = run.training
    return torch.optim.SGD(groups, lr=training.learning_rate, weight_decay=training.weight_decay, **training.optim_args)
