"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from fourfold.rewards.interface import Rollout
from fourfold.rewards.table import RewardTable
from reward_rollouts import rollouts


@dataclass(frozen=True)
class Given:
    """A reward that was told what to say."""

    name: str
    scores: list[float]

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return self.scores


def test_score_when_some_say_nothing_adds_up_the_others_weighted() -> None:
    nan = math.nan
    table = RewardTable([Given("a", [1, nan, nan]), Given("b", [4, 4, nan])], [2, 0.5])
    scores = table.score(rollouts("x", "y", "z"))
    assert scores.by_name["b"][:2] == [4, 4]
    assert scores.total[:2] == [4, 2]
    assert math.isnan(scores.total[2])


def test_score_when_there_are_no_rollouts_gives_none() -> None:
    scores = RewardTable([Given("a", []), Given("b", [])], [1, 1]).score([])
    assert scores.by_name == {"a": [], "b": []}
    assert scores.total == []


def test_table_when_two_rewards_share_a_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="name"):
        RewardTable([Given("a", []), Given("a", [])], [1, 1])
