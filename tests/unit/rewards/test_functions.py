"""Python functions as rewards, and what becomes of those that misbehave."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fourfold.base.errors import ConfigError
from fourfold.rewards.functions import FunctionReward
from fourfold.rewards.imported import INPUTS, Imported
from fourfold.rewards.interface import Rollout
from fourfold.rewards.notices import Notices
from reward_rollouts import rollout, rollouts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reward(clock: Clock) -> Callable[..., FunctionReward]:
    def make(function: Callable[..., Any], inputs: tuple[str, ...] = ("completions",)) -> FunctionReward:
        return FunctionReward(Imported("my.rewards:f", "f", function, inputs), "f", Notices(clock))

    return make


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def shown(scores: list[float]) -> list[float | None]:
    return [None if math.isnan(score) else score for score in scores]


def picky(completions: list[str]) -> list[float]:
    if any(one.startswith("bad") for one in completions):
        raise ValueError("no\nnumber")
    return [float(len(one)) for one in completions]


def test_score_when_function_names_inputs_gives_it_these(reward: Callable[..., FunctionReward]) -> None:
    seen: dict[str, Any] = {}

    def function(**given: Any) -> list[float]:
        seen.update(given)
        return [1.0, 2.0]

    cut = Rollout("p", "b", None, (1,), (2, 3), False)
    assert reward(function, INPUTS).score([rollout("a", "r", prompt="q"), cut]) == [1.0, 2.0]
    assert seen == {
        "prompts": ["q", "p"],
        "completions": ["a", "b"],
        "references": ["r", None],
        "prompt_ids": [[113], [1]],
        "completion_ids": [[97], [2, 3]],
        "finished": [True, False],
    }


@pytest.mark.parametrize(
    "returned",
    [
        [1, None, True],
        (1.0, None, np.float32(1)),
        [Fraction(1), None, torch.tensor(1.0)],
        [np.int64(1), None, np.bool_(True)],
    ],
)
def test_score_when_numbers_are_of_any_kind_makes_them_floats(
    reward: Callable[..., FunctionReward], returned: Any, warnings: Callable[[], list[str]]
) -> None:
    assert shown(reward(lambda completions: returned).score(rollouts("a", "b", "c"))) == [1.0, None, 1.0]
    assert warnings() == []


@pytest.mark.parametrize("returned", [torch.tensor([1.0, 2.0]), np.array([1, 2])])
def test_score_when_an_array_is_returned_reads_it(reward: Callable[..., FunctionReward], returned: Any) -> None:
    assert reward(lambda completions: returned).score(rollouts("a", "b")) == [1.0, 2.0]


def test_score_when_one_completion_makes_it_raise_loses_only_that(
    reward: Callable[..., FunctionReward], warnings: Callable[[], list[str]]
) -> None:
    scores = reward(picky).score(rollouts("abc", "bad one", "ab"))
    assert shown(scores) == [3.0, None, 2.0]
    assert warnings() == [
        "reward_funcs: my.rewards:f raised ValueError('no\\nnumber') for 1 of 3 completions, first for 'bad one'; they "
        "get no reward. Let it return None where it cannot tell."
    ]


def test_score_when_it_fails_often_warns_once_a_minute_and_counts(
    reward: Callable[..., FunctionReward], clock: Clock, warnings: Callable[[], list[str]]
) -> None:
    guarded = reward(picky)
    for clock.now in (0.0, 1.0, 59.9):
        guarded.score(rollouts("ok", "bad", "bad too"))
    assert len(warnings()) == 1
    clock.now = 60.0
    guarded.score(rollouts("ok", "bad"))
    assert len(warnings()) == 2
    assert warnings()[1].endswith("So did 4 more since the last such line.")


def test_score_when_every_completion_of_the_first_call_fails_ends(reward: Callable[..., FunctionReward]) -> None:
    guarded = reward(picky)
    assert guarded.score([]) == []
    with pytest.raises(ConfigError) as caught:
        guarded.score(rollouts("bad 1", "bad 2"))
    assert str(caught.value) == (
        "reward_funcs: my.rewards:f raised ValueError('no\\nnumber') for every completion of the first call (2), first "
        "for 'bad 1'. Correct it."
    )


def test_score_when_every_completion_of_a_later_call_fails_goes_on(reward: Callable[..., FunctionReward]) -> None:
    guarded = reward(picky)
    guarded.score(rollouts("ok"))
    assert shown(guarded.score(rollouts("bad 1", "bad 2"))) == [None, None]


def test_score_when_not_finite_is_no_reward_and_warned_of(
    reward: Callable[..., FunctionReward], warnings: Callable[[], list[str]]
) -> None:
    returned = [math.nan, math.inf, -math.inf, 10**400, 1.0]
    scores = reward(lambda completions: returned).score(rollouts(*"abcde"))
    assert shown(scores) == [None, None, None, None, 1.0]
    (warning,) = warnings()
    assert "returned NaN or inf for 4 of 5 completions, first for 'a'" in warning


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        ([], "returned 0 rewards for 2 completions"),
        (1.0, "returned a float for 2 completions"),
        (None, "returned a NoneType for 2 completions"),
        ("ab", "returned a str for 2 completions"),
        ([1.0, "1"], "returned a str ('1') as a reward"),
        ([1.0, [1.0]], "returned a list ('[1.0]') as a reward"),
        (torch.zeros(2, 1), "returned a list ('[0.0]') as a reward"),
        (torch.tensor(1.0), "returned a float for 2 completions"),
        ([1.0, 1j], "returned a complex ('1j') as a reward"),
    ],
)
def test_score_when_it_returns_something_else_ends_at_once(
    reward: Callable[..., FunctionReward], returned: Any, expected: str
) -> None:
    guarded = reward(lambda completions: returned if len(completions) == 2 else [0.0])
    guarded.score(rollouts("x"))
    with pytest.raises(ConfigError) as caught:
        guarded.score(rollouts("a", "b"))
    assert str(caught.value).startswith(f"reward_funcs: my.rewards:f {expected}. A reward function takes lists")


def test_score_when_the_user_interrupts_stops(reward: Callable[..., FunctionReward]) -> None:
    def function(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward(function).score(rollouts("a"))
