"""Generation with the weights that are being trained, under the training layout."""

from fourfold.generate.rollout.cache import can_roll_out
from fourfold.generate.rollout.engine import Completion, RolloutEngine

__all__ = ["Completion", "RolloutEngine", "can_roll_out"]
