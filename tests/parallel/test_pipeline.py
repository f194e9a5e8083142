"""A model cut into pipeline stages trains as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Case, alone, assert_together_same, under

from fourfold.planning.layout import Layout

LAYERS = (("num_hidden_layers", 8),)


def _pp(size: int, schedule: Any, **sizes: Any) -> Layout:
    return Layout(pp=size, pp_schedule=schedule, **sizes)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zbv"])
def test_training_when_in_two_stages_equals_one_process(schedule: str) -> None:
    case = Case(overrides=(("num_hidden_layers", 4),))
    torch.set_num_threads(1)
    assert_together_same(under(case, _pp(2, schedule)), alone(case))
