"""Which layers and micro-batches the stages of a pipeline get."""

from __future__ import annotations

from typing import Any

import pytest

from fourfold.planning.layout import Layout
from fourfold.planning.stages import (
    check_stages,
    min_microbatches,
    rank_of_stage,
    round_microbatches,
    stage_layers,
    stages_of_rank,
)


def _sizes(layout: Layout, layers: int) -> list[int]:
    return [len(layers) for layers in stage_layers(layout, layers)]


def test_stage_layers_when_uneven_gives_the_middle_more() -> None:
    assert _sizes(Layout(pp=4), 6) == [1, 2, 2, 1]
    assert _sizes(Layout(pp=2), 3) == [2, 1]
    assert _sizes(Layout(pp=2, pp_layers=(1, 4)), 5) == [1, 4]
    assert stage_layers(Layout(pp=2, pp_layers=(1, 4)), 5) == [range(1), range(1, 5)]


def test_stages_of_rank_when_zbv_form_a_v() -> None:
    layout = Layout(pp=3, pp_schedule="zbv")
    assert [stages_of_rank(layout, rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert rank_of_stage(layout, -1) == 0
    looped = Layout(pp=3, pp_schedule="interleaved_1f1b")
    assert [stages_of_rank(looped, rank) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert rank_of_stage(looped, -1) == 2


@pytest.mark.parametrize(
    ("schedule", "counts"), [("gpipe", [1, 5]), ("1f1b", [4, 5]), ("interleaved_1f1b", [4, 8]), ("zbv", [1, 5])]
)
def test_round_microbatches_gives_what_the_schedule_runs(schedule: Any, counts: list[int]) -> None:
    layout = Layout(pp=4, pp_schedule=schedule)
    assert [round_microbatches(layout, count) for count in (1, 5)] == counts
    assert min_microbatches(layout) == 4


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(pp=4, pp_schedule="zbv"), "zbv cuts the model into 8 stages, and it has 6 layers. Use parallel.pp: 3"),
        (Layout(pp=2, pp_layers=(3, 2, 1)), "3 numbers for 2 stages"),
        (Layout(pp=2, pp_layers=(3, 2)), "[3, 2] are 5 layers in all, and the model has 6"),
    ],
)
def test_check_stages_when_layers_do_not_fit_says_what_does(layout: Layout, message: str) -> None:
    [problem] = check_stages(layout, 6)
    assert message in problem


def test_check_stages_when_all_fits_finds_nothing() -> None:
    assert check_stages(Layout(pp=3, pp_schedule="zbv"), 6) == []
    assert check_stages(Layout(), 1) == []
