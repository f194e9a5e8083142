"""What ranks of a pipeline keep at a time, against PyTorch's own orders of work and against counts by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from fourfold.planning.in_flight import flights, work_order
from fourfold.planning.layout import Layout
from fourfold.planning.stages import stages_of_rank

_SCHEDULES: dict[str, Any] = {
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "zbv": schedules.ScheduleZBVZeroBubble,
}


_LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torch_order(name: str, pp: int, rank: int, batches: int) -> list[tuple[str, int]]:
    """(kind, stage) of a rank's work, from the schedule's own method on an object without stages."""
    schedule = object.__new__(_SCHEDULES[name])
    schedule.pp_group_size, schedule.num_stages, schedule.n_local_stages = pp, 2 * pp, 2
    schedule.rank, schedule._n_microbatches = rank, batches
    schedule.number_of_rounds = max(1, batches // pp)
    schedule.microbatches_per_round = batches // schedule.number_of_rounds
    return [
        (_LETTERS[action.computation_type.name], action.stage_index)
        for action in schedule._calculate_single_rank_operations(rank)
        if action is not None
    ]


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize(("schedule", "counts"), [("interleaved_1f1b", (1, 2, 3)), ("zbv", (1, 1.5, 2, 3.25))])
def test_work_order_when_a_rank_has_two_stages_is_that_of_torch(
    schedule: Any, counts: Sequence[float], pp: int
) -> None:
    layout = Layout(pp=pp, pp_schedule=schedule)
    for batches in {int(count * pp) for count in counts}:
        for rank in range(pp):
            own = stages_of_rank(layout, rank)
            order = [(work.kind, own[work.stage]) for work in work_order(layout, rank, batches)]
            assert order == torch_order(schedule, pp, rank, batches)


def test_flights_when_a_rank_has_one_stage_hold_as_many_as_stages_follow() -> None:
    assert [flight.held for flight in flights(Layout(pp=4), 1, 8)] == [(3,), (3,)]
    assert [flight.held for flight in flights(Layout(pp=4), 0, 4)] == [(4,), (3,)]
    assert [flight.held for flight in flights(Layout(pp=4, pp_schedule="gpipe"), 3, 6)] == [(6,), (5,)]
    assert [flight.held for flight in flights(Layout(), 0, 1)] == [(1,)]


def test_flights_when_interleaved_hold_a_round_and_two_more_for_each_rank_behind() -> None:
    # 4 + 2 x 3 forward passes before the first backward one (4 of stage 0, 4 of stage 4, 2 of stage 0), one beside it
    assert (7, 4) in [flight.held for flight in flights(Layout(pp=4, pp_schedule="interleaved_1f1b"), 0, 8)]


@pytest.mark.parametrize("rank", range(4))
def test_flights_when_zbv_hold_twice_as_many_as_ranks_on_every_rank(rank: int) -> None:
    found = flights(Layout(pp=4, pp_schedule="zbv"), rank, 8)
    assert max(sum(flight.held) for flight in found) == 8
    # on the way out rank 2 puts off two micro-batches of each stage, and rank 0 none
    assert max(sum(flight.split) for flight in found) == {0: 1, 1: 3, 2: 5, 3: 7}[rank]


def test_flights_when_zbv_count_gradients_that_are_kept_and_none_of_the_first_stage() -> None:
    handed = [max(flight.handed for flight in flights(Layout(pp=2, pp_schedule="zbv"), rank, 4)) for rank in (0, 1)]
    assert handed[0] <= 4 < handed[1] <= 8
