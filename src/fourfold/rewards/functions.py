"""Python functions as rewards, guarded so that one bad completion does not end a long run.

A function gets lists as keywords (`imported.INPUTS`, those that it names or all for `**kwargs`) and returns a list with
one number for each completion, or None where it says nothing. One that was written for TRL,
`def f(completions, **kwargs) -> list[float | None]`, works as it is, if it takes completions as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from fourfold.base.errors import ConfigError
from fourfold.rewards.imported import Imported
from fourfold.rewards.interface import Rollout
from fourfold.rewards.notices import Notices, shown_error, start_of

_RETURNS = "A reward function takes lists and returns a list with one number, or None, for each completion"


class FunctionReward:
    """Scores rollouts by a Python function.

    A call that raises is made again for each rollout alone, and those that raise again have no reward; the same holds
    for NaN and inf. Both are warned about, at most once a minute.

    Args:
        imported: the function.
        name: of its metric.
        notices: where its warnings go.
    """

    def __init__(self, imported: Imported, name: str, notices: Notices | None = None) -> None:
        self.name = name
        self._imported = imported
        self._notices = notices or Notices()
        self._proven = False

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The function's numbers; NaN for None, and where it failed.

        Raises:
            ConfigError: it returns a wrong number of rewards or something else than numbers, or fails for every rollout
                of the first call.
        """
        if not rollouts:
            return []
        try:
            scores = _read(self._imported.entry, self._call(rollouts), len(rollouts))
        except _RaisedError:
            scores = self._score_alone(rollouts)
        self._proven = True
        lost = [index for index, score in enumerate(scores) if math.isinf(score)]
        if lost:
            message = f"returned NaN or inf for {len(lost)} of {len(rollouts)} completions"
            self._warn(message, rollouts[lost[0]], len(lost))
        return [math.nan if math.isinf(score) else score for score in scores]

    def _score_alone(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One call for each rollout; NaN for those that raise."""
        scores: list[float] = []
        failed: list[tuple[Rollout, BaseException]] = []
        for rollout in rollouts:
            try:
                scores += _read(self._imported.entry, self._call([rollout]), 1)
            except _RaisedError as raised:
                scores.append(math.nan)
                failed.append((rollout, raised.error))
        if not failed:  # it fails for some rollouts together only
            return scores
        first, error = failed[0]
        if len(failed) == len(rollouts) and not self._proven:
            raise ConfigError(
                f"reward_funcs: {self._imported.entry} raised {shown_error(error)} for every completion of the first "
                f"call ({len(rollouts)}), first for {start_of(first.completion)}. Correct it."
            ) from error
        self._warn(f"raised {shown_error(error)} for {len(failed)} of {len(rollouts)} completions", first, len(failed))
        return scores

    def _warn(self, what: str, first: Rollout, num_completions: int) -> None:
        told = f"reward_funcs: {self._imported.entry} {what}, first for {start_of(first.completion)}"
        self._notices.tell(f"{told}; they get no reward. Let it return None where it cannot tell.", num_completions)

    def _call(self, rollouts: Sequence[Rollout]) -> Any:
        columns = {
            "prompts": [rollout.prompt for rollout in rollouts],
            "completions": [rollout.completion for rollout in rollouts],
            "references": [rollout.reference for rollout in rollouts],
            "prompt_ids": [list(rollout.prompt_ids) for rollout in rollouts],
            "completion_ids": [list(rollout.completion_ids) for rollout in rollouts],
            "finished": [rollout.finished for rollout in rollouts],
        }
        try:
            return self._imported.function(**{name: columns[name] for name in self._imported.inputs})
        except Exception as error:
            raise _RaisedError(error) from error


class _RaisedError(Exception):
    """The user's function raised `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _read(entry: str, returned: Any, expected: int) -> list[float]:
    """What a function returned, as floats: NaN for None, inf for NaN and inf.

    Raises:
        ConfigError: it is no list of numbers, or of another length.
    """
    values = returned.tolist() if isinstance(returned, np.ndarray | Tensor) else returned
    if not isinstance(values, list | tuple):
        raise ConfigError(
            f"reward_funcs: {entry} returned a {type(values).__name__} for {expected} completions. {_RETURNS}."
        )
    if len(values) != expected:
        raise ConfigError(
            f"reward_funcs: {entry} returned {len(values)} rewards for {expected} completions. {_RETURNS}."
        )
    return [_number(entry, value) for value in values]


def _number(entry: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if not isinstance(value, Real):
        raise ConfigError(
            f"reward_funcs: {entry} returned a {type(value).__name__} ({start_of(str(value))}) as a reward. {_RETURNS}."
        )
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    return number if math.isfinite(number) else math.inf
