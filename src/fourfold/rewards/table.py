"""Several rewards, weighted, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourfold.losses.advantages import total_rewards
from fourfold.rewards.interface import Reward, Rollout


@dataclass(frozen=True, slots=True)
class Scores:
    """What all rewards say of some rollouts.

    Attributes:
        by_name: for each reward one number per rollout, NaN where it says nothing of it.
        total: for each rollout the weighted sum of the rewards that say something; NaN where none does.
    """

    by_name: dict[str, list[float]]
    total: list[float]


class RewardTable:
    """Scores rollouts by every reward of a run.

    Args:
        rewards: at least one, each with a name of its own.
        weights: one for each reward.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self._rewards = {reward.name: reward for reward in rewards}
        self._weights = torch.tensor(list(weights), dtype=torch.float32)
        assert len(self._rewards) == len(rewards) == len(weights) > 0, "every reward has a name and a weight"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rewards, in their order."""
        return tuple(self._rewards)

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Ask every reward, one after the other.

        Raises:
            ConfigError: a reward cannot work at all.
        """
        by_name = {name: reward.score(rollouts) for name, reward in self._rewards.items()}
        for name, scores in by_name.items():
            assert len(scores) == len(rollouts), f"{name} gave {len(scores)} scores for {len(rollouts)} rollouts"
        columns = torch.tensor(list(by_name.values()), dtype=torch.float32)
        return Scores(by_name, total_rewards(columns.T, self._weights).tolist())
