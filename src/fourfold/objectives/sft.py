"""Supervised fine-tuning: cross entropy of the answers, given everything before them."""

from __future__ import annotations

from fourfold.config.schema import Run
from fourfold.losses.token import build_token_loss
from fourfold.objectives.interface import Objective


def build(run: Run) -> Objective:
    """The objective of stage `sft`."""
    return build_token_loss(run)
