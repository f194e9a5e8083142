"""Adafactor with a fixed learning rate (arXiv:1804.04235), from Transformers, set as its Trainer sets it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from fourfold.config.schema import Run


def build(groups: list[dict[str, Any]], model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Adafactor over parameter groups: no relative steps, no parameter scaling."""
    settings: dict[str, Any] = {"scale_parameter": False, "relative_step": False, **run.training.optim_args}
    return Adafactor(groups, lr=run.training.learning_rate, **settings)
