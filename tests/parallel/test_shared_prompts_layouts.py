"""Pairs whose answers share their prompt train as those that do not, under every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import Case, Curve, alone, assert_together_same, under

from fourfold.planning.layout import Layout

LAYOUTS = {
    "one": Layout(),
    "ddp2": Layout(dp_replicate=2),
    "zero3-2": Layout(dp_shard=2),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "fsdp2xtp2": Layout(dp_shard=2, tp=2),
}
CASES = {
    "llama-full": Case(stage="dpo", max_tokens=128),
    "gemma3-lora": Case(stage="dpo", family="gemma3_text", tuning="lora", max_tokens=128),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process that shares nothing."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_training_when_answers_share_their_prompt_equals_apart(
    layout: str, case: str, references: dict[str, Curve]
) -> None:
    shared = replace(CASES[case], shares=2)
    curves = [alone(shared)] if layout == "one" else under(shared, LAYOUTS[layout])
    assert_together_same(curves, references[case])
