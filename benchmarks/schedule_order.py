"""What a pipeline idles by the order in which torch's runtime posts sends and receives, computed without a GPU.

    python benchmarks/schedule_order.py [--ranks 4] [--micro-batches 8]

Every action of `_PipelineScheduleRuntime` is timed on each rank: computation in order, a send or a receive after what
its own stream was given before, after the computation that was posted before it, and when its other side is as far.
With one stream for all of them, as a process group has; and with one each for sends and receives of either direction,
as four groups would have. A forward pass of all stages of a rank takes 1, its backward pass 2, a message 0.02.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.testing._internal.distributed.fake_pg import FakeStore

from fourfold.planning.layout import Layout
from fourfold.planning.stages import num_stages, rank_of_stage, stages_of_rank

Schedule = Literal["interleaved_1f1b", "zbv"]
_SCHEDULES: dict[Schedule, Any] = {"interleaved_1f1b": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble}
_FORWARD_S, _BACKWARD_S, _MESSAGE_S = 1.0, 2.0, 0.02
_SECONDS = {
    "FORWARD": _FORWARD_S / 2,
    "FULL_BACKWARD": _BACKWARD_S / 2,
    "BACKWARD_INPUT": _BACKWARD_S / 4,
    "BACKWARD_WEIGHT": _BACKWARD_S / 4,
}
"""Of one of a rank's two stages."""
_INPUT_BACKWARD = ("FULL_BACKWARD", "BACKWARD_INPUT")
_NEVER = float("inf")
_MOST_PASSES = 10_000

Key = tuple[str, int, int]
"""F or B, the stage that a message goes to, or that has computed, and the micro-batch."""


def orders(schedule: Schedule, ranks: int, micro_batches: int) -> dict[int, list[Any]]:
    """What each rank does, in order, sends and receives included."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        numbers = stages_of_rank(Layout(pp=ranks, pp_schedule=schedule), 0)
        wire = torch.empty(1, 2, device="meta")
        stages = [
            PipelineStage(nn.Linear(2, 2), number, 2 * ranks, torch.device("cpu"), input_args=wire, output_args=wire)
            for number in numbers
        ]
        made: Any = _SCHEDULES[schedule](list(stages), micro_batches, loss_fn=lambda output, target: output)
        found = made.pipeline_order_with_comms
        return {rank: [action for action in actions if action is not None] for rank, actions in found.items()}
    finally:
        dist.destroy_process_group()


def idle_share(actions: dict[int, list[Any]], schedule: Schedule, streams: Literal["one", "four"]) -> float:
    """Of a step, what the busiest rank idles."""
    done: dict[Key, float] = {}
    arrived: dict[Key, float] = {}
    for _ in range(_MOST_PASSES):  # until nothing moves
        before = dict(done), dict(arrived)
        done, arrived, total = _pass(actions, schedule, streams, *before)
        if (done, arrived) == before:
            busiest = max(sum(_SECONDS.get(_kind(action), 0.0) for action in own) for own in actions.values())
            return 1 - busiest / total
    raise RuntimeError("the ranks wait for each other")


def _pass(
    actions: dict[int, list[Any]],
    schedule: Schedule,
    streams: Literal["one", "four"],
    done: dict[Key, float],
    arrived: dict[Key, float],
) -> tuple[dict[Key, float], dict[Key, float], float]:
    """When stages have computed, messages have arrived, and all is over, from what is known of them."""
    layout, found, total = Layout(pp=len(actions), pp_schedule=schedule), {}, 0.0
    sent: dict[Key, float] = {}
    asked: dict[Key, float] = {}
    for rank, own in actions.items():
        computing = 0.0
        busy: dict[str, float] = defaultdict(float)
        for action in own:
            kind, stage, number = _kind(action), action.stage_index, action.microbatch_index
            if kind in _SECONDS:
                way = "F" if kind == "FORWARD" else "B"
                other = stage - 1 if way == "F" else stage + 1
                starts = 0.0
                if kind != "BACKWARD_WEIGHT" and 0 <= other < num_stages(layout):
                    here = rank_of_stage(layout, other) == rank
                    starts = (done if here else arrived).get((way, other if here else stage, number), _NEVER)
                computing = max(computing, starts) + _SECONDS[kind]
                if kind == "FORWARD" or kind in _INPUT_BACKWARD:
                    found[way, stage, number] = computing
            elif kind.startswith(("SEND", "RECV")):
                what, way = kind.split("_")
                to = stage if what == "RECV" else stage + 1 if way == "F" else stage - 1
                key, stream = (way, to, number), "" if streams == "one" else kind
                (sent if what == "SEND" else asked)[key] = max(busy[stream], computing)
                busy[stream] = arrived.get(key, _NEVER)
        total = max(total, computing)
    return found, {key: max(sent[key], asked[key]) + _MESSAGE_S for key in sent if key in asked}, total


def _kind(action: Any) -> str:
    return action.computation_type.name


def main() -> None:
    """Print a line for each schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    args = parser.parse_args()
    ranks, count = args.ranks, args.micro_batches
    plain = (ranks - 1) / (count + ranks - 1)
    print(f"1f1b by its formula {plain:.3f}, interleaved_1f1b {(ranks - 1) / (2 * count + ranks - 1):.3f}")
    for schedule in _SCHEDULES:
        actions = orders(schedule, ranks, count)
        one, four = (idle_share(actions, schedule, streams) for streams in ("one", "four"))
        print(f"{schedule}: idles {one:.3f} with one stream, {four:.3f} with four")


if __name__ == "__main__":
    main()
