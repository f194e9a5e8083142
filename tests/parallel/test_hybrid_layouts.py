"""Layers that carry a state along a row train on packed rows under a layout as in one process."""

from __future__ import annotations

import pytest
import torch
from harness import Case, Curve, alone, assert_same, assert_together_same, under

from fourfold.planning.layout import Layout

LAYOUTS = {"ddp2": Layout(dp_replicate=2), "zero3-2": Layout(dp_shard=2), "pp2": Layout(pp=2)}
_MILD = (("initializer_range", 0.05),)  # gated delta nets of a few dimensions magnify rounding with larger weights
CASES = {
    "qwen3_5-full": Case(family="qwen3_5_text", overrides=_MILD),
    "qwen3_5-lora-recompute": Case(family="qwen3_5_text", tuning="lora", recompute="full", overrides=_MILD),
    "qwen3_next-full": Case(family="qwen3_next", overrides=_MILD),
    "lfm2-lora": Case(family="lfm2", tuning="lora"),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, layout) for case in CASES for layout in LAYOUTS if (case, layout) != ("lfm2-lora", "pp2")],
)
def test_hybrid_when_split_equals_one_process(case: str, layout: str, references: dict[str, Curve]) -> None:
    """Transformers has no plan of how to cut lfm2 into stages."""
    curves = under(CASES[case], LAYOUTS[layout])
    if layout == "pp2":
        assert_together_same(curves, references[case])
    for curve in curves if layout != "pp2" else ():
        assert_same(curve, references[case])
