"""Plain stochastic gradient descent, PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch

from fourfold.config.schema import Run


def build(groups: list[dict[str, Any]], run: Run) -> torch.optim.Optimizer:
    """SGD over parameter groups, without momentum, as Transformers' `optim: sgd`."""
    return torch.optim.SGD(groups, lr=run.training.learning_rate, weight_decay=run.training.weight_decay)
