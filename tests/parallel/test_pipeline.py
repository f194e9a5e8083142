"""A model cut into pipeline stages trains as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import STEPS, Case, Curve, alone, under

from fourfold.planning.layout import Layout

LAYERS = (("num_hidden_layers", 8),)


def assert_together_same(curves: list[Curve], reference: Curve, tolerance: float = 1e-5) -> None:
    """As one process: losses and norms on every rank, and each parameter's first gradient on one that has it."""
    largest = max(float(grad.abs().max()) for grad in reference.gradients.values())
    seen: set[str] = set()
    for curve in curves:
        assert len(curve.losses) == STEPS
        assert curve.losses == pytest.approx(reference.losses, abs=tolerance)
        assert curve.norms == pytest.approx(reference.norms, rel=1e-3)
        for name, grad in curve.gradients.items():
            whole = reference.gradients[name]
            part = curve.shares[name].take(whole) if name in curve.shares else whole
            assert float((part - grad).abs().max()) <= 1e-6 * largest, name
            seen.add(name)
    assert seen == reference.gradients.keys()


def _pp(size: int, schedule: Any, **sizes: Any) -> Layout:
    return Layout(pp=size, pp_schedule=schedule, **sizes)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zbv"])
def test_training_when_in_two_stages_equals_one_process(schedule: str) -> None:
    case = Case(overrides=(("num_hidden_layers", 4),))
    torch.set_num_threads(1)
    assert_together_same(under(case, _pp(2, schedule)), alone(case))
