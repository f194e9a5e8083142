"""Pre-training on plain text: cross entropy of every token."""

from __future__ import annotations

from fourfold.config.schema import Run
from fourfold.losses.token import build_token_loss
from fourfold.objectives.interface import Objective


def build(run: Run) -> Objective:
    """The objective of stage `pt`."""
    return build_token_loss(run)
