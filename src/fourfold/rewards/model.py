"""The reward model that was trained by stage rm, as one of the rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from fourfold.rewards.interface import Rollout
from fourfold.rewards.notices import Notices

NAME = "reward_model"
"""What the reward of key `reward_model` is called, whatever its type."""

Scorer: TypeAlias = Callable[[Sequence[Sequence[int]]], list[float]]
"""Token ids of whole sequences, prompt and completion -> the reward model's score of each."""


class ModelReward:
    """Scores a prompt and its completion by a reward model.

    Args:
        scorer: runs the model, under whatever layout it has.
    """

    name = NAME

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._notices = Notices()

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The model's scores; NaN, with a warning, where it gives no finite one."""
        scores = self._scorer([[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts])
        lost = sum(not math.isfinite(score) for score in scores)
        if lost:
            message = f"reward_model: gave NaN or inf for {lost} of {len(scores)} completions; they get no reward."
            self._notices.tell(message, lost)
        return [score if math.isfinite(score) else math.nan for score in scores]
