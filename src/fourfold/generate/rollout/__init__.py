"""Generation with the weights that are being trained, under the training layout."""

from fourfold.generate.rollout.engine import Completion, RolloutEngine

__all__ = ["Completion", "RolloutEngine"]
