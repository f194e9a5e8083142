"""Rollouts with given texts, for tests of rewards."""

from __future__ import annotations

from fourfold.rewards.interface import Rollout


def rollout(completion: str, reference: str | None = None, prompt: str = "Q: ") -> Rollout:
    """One whose token ids are the code points of its texts."""
    return Rollout(prompt, completion, reference, [ord(c) for c in prompt], [ord(c) for c in completion], True)


def rollouts(*completions: str) -> list[Rollout]:
    return [rollout(completion) for completion in completions]
