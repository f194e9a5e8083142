"""AdamW with 8-bit block-wise quantised moments (arXiv:2110.02861), from bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fourfold.base.errors import ConfigError
from fourfold.base.extras import install_extra
from fourfold.config.schema import Run


def build(groups: list[dict[str, Any]], model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """8-bit AdamW over parameter groups.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optim: adamw_8bit needs bitsandbytes, which is not installed. Run {install_extra('quant')}."
        ) from error
    training = run.training
    settings: dict[str, Any] = {
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        **training.optim_args,
    }
    return AdamW8bit(groups, lr=training.learning_rate, weight_decay=training.weight_decay, **settings)
