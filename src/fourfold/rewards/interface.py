"""What a reward is: it sees rollouts and says one number of each, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion that the policy generated.

    Attributes:
        prompt: what it was given, as text.
        completion: what it answered, as text.
        reference: the data row's own answer, None if the row has none.
        prompt_ids: token ids of the prompt.
        completion_ids: token ids of the completion, with the stop token if it came to one.
        finished: whether it came to a stop token, and was not cut off by the longest length.
        extras: further numbers about it, by name.
    """

    prompt: str
    completion: str
    reference: str | None
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    finished: bool
    extras: Mapping[str, float] = field(default_factory=dict)


class Reward(Protocol):
    """One source of rewards."""

    @property
    def name(self) -> str:
        """What its metric is called: `rewards/<name>`."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One finite number for each rollout; NaN where it says nothing of it.

        Raises:
            ConfigError: it cannot work at all.
        """
        ...
