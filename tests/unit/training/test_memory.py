"""Fitting a step into memory: cut first, then recompute what is cheap, then everything."""

from __future__ import annotations

import pytest

from fourfold.dataset.collate import CutPolicy
from fourfold.parallel.recompute import Recompute
from fourfold.training.memory import StepSizes, choose_fit


def _room(none: int, selective: int) -> dict[Recompute, int]:
    return {"none": none, "selective": selective, "full": 10 * selective}


@pytest.mark.parametrize(
    ("room", "asked", "expected", "tokens"),
    [
        (_room(8000, 16000), None, "none", 8000),
        (_room(3000, 6000), None, "none", 3000),  # cut, since 2,048 tokens are enough for speed
        (_room(1500, 2500), None, "selective", 2500),
        (_room(500, 1000), None, "full", 8000),
        (_room(8000, 16000), "selective", "selective", 8000),
        (_room(500, 1000), "none", "none", 600),  # the longest sample cannot be cut
    ],
)
def test_fit_when_room_shrinks_cuts_then_recomputes_more(
    room: dict[Recompute, int], asked: Recompute | None, expected: Recompute, tokens: int
) -> None:
    policy = CutPolicy(packed=True, max_tokens=8000)
    fit = choose_fit(policy, StepSizes(longest=600, step=9000), room=room.__getitem__, recompute=asked)
    assert (fit.recompute, fit.policy.max_tokens) == (expected, tokens)
