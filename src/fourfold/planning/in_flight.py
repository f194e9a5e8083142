"""How many micro-batches a rank of a pipeline keeps at a time, stage by stage, in the order of PyTorch's schedules.

With one stage a rank that is a formula. With two, stages need not be equally large, and zbv keeps a micro-batch until
the gradients of its weights are made, so the order of work is gone through (torch's ScheduleInterleaved1F1B and
ScheduleZBVZeroBubble) and every state noted that may be the peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from fourfold.planning.layout import Layout
from fourfold.planning.stages import num_stages, stages_of_rank


class Work(NamedTuple):
    """One piece of a rank's step, in the letters of PyTorch's schedules.

    Attributes:
        kind: a forward pass (F), a backward pass (B), or its two parts: gradients of inputs (I) and of weights (W).
        stage: which of the rank's own stages.
    """

    kind: Literal["F", "B", "I", "W"]
    stage: int


@dataclass(frozen=True, slots=True)
class Flight:
    """What of a step a rank keeps at one time.

    Attributes:
        held: for each of its stages, micro-batches whose activations are kept.
        split: of these, such whose inputs have gradients and whose weights have none yet.
        begun: for each of its stages, whether its weights have gradients of an earlier micro-batch.
        ended: whether a forward pass has just ended here, of the job's last stage if the rank has it.
        forward: whether a forward pass may be at its peak here.
        handed: gradients of inputs that PyTorch keeps until a step ends: those that were made without the weights'.
    """

    held: tuple[int, ...]
    split: tuple[int, ...]
    begun: tuple[bool, ...]
    ended: bool = True
    forward: bool = True
    handed: int = 0

    @property
    def is_split(self) -> bool:
        """Whether a micro-batch is between the two parts of its backward pass."""
        return any(self.split)


def flights(layout: Layout, pp_rank: int, batches: int) -> tuple[Flight, ...]:
    """The states that may be a rank's peak.

    Args:
        layout: of which the pipeline counts.
        batches: micro-batches of a step.
    """
    return _flights(Layout(pp=layout.pp, pp_schedule=layout.pp_schedule), pp_rank, batches)


@lru_cache(maxsize=4096)
def _flights(layout: Layout, pp_rank: int, batches: int) -> tuple[Flight, ...]:
    """The same of a layout that is nothing but a pipeline, so that many layouts share it."""
    if num_stages(layout) > layout.pp:
        return tuple(_largest(_states(layout, pp_rank, batches)))
    flying = 1 if layout.pp == 1 else batches if layout.pp_schedule == "gpipe" else min(layout.pp - pp_rank, batches)
    # once before there are gradients, with all that fly; once with them, where forward passes are still to come
    found = [Flight((flying,), (0,), (False,))]
    if batches > 1:
        found.append(Flight((min(flying, batches - 1),), (0,), (True,), forward=batches > flying))
    return tuple(found)


def _states(layout: Layout, pp_rank: int, batches: int) -> Iterator[Flight]:
    own = stages_of_rank(layout, pp_rank)
    last = len(own) - 1 if num_stages(layout) - 1 in own else None
    held, split, begun, handed = [0, 0], [0, 0], [False, False], 0
    for work in work_order(layout, pp_rank, batches):
        stage = work.stage
        if work.kind == "I" and own[stage] == 0:
            continue  # nobody wants the first stage's gradient: PyTorch makes both with the weights'
        if work.kind == "F":
            held[stage] += 1
        elif work.kind == "I":
            split[stage] += 1
            handed += 1
        else:
            held[stage] -= 1
            split[stage] = max(split[stage] - 1, 0)
            begun[stage] = True
        if work.kind in ("F", "I"):
            is_forward = work.kind == "F"
            ended = is_forward and (last is None or stage == last)
            yield Flight(tuple(held), tuple(split), tuple(begun), ended, is_forward, handed)


def _largest(states: Iterator[Flight]) -> list[Flight]:
    """Without those that another one exceeds everywhere; of equal ones the latest, which has most gradients."""
    kept: dict[tuple[object, ...], Flight] = {}
    for state in states:
        kept[state.held, state.split, state.begun, state.ended, state.forward] = state
    found = list(kept.values())
    return [state for state in found if not any(_exceeds(other, state) for other in found if other is not state)]


def _exceeds(more: Flight, less: Flight) -> bool:
    """Whether one state holds all micro-batches that another does, which are large beside what was handed on."""
    pairs = zip(
        (*more.held, *more.split, *more.begun, more.ended, more.forward),
        (*less.held, *less.split, *less.begun, less.ended, less.forward),
        strict=True,
    )
    return all(one >= other for one, other in pairs)


def work_order(layout: Layout, pp_rank: int, batches: int) -> Iterator[Work]:
    """What a rank with two stages does in a step, first to last."""
    order = _zbv_order if layout.pp_schedule == "zbv" else _interleaved_order
    done = dict.fromkeys((Work(kind, stage) for kind in ("F", "B", "I", "W") for stage in (0, 1)), 0)
    for work in order(layout.pp, pp_rank, batches):
        if done[work] < batches:  # zbv plans for 2 p - 1 micro-batches at least, and leaves out what is not there
            yield work
        done[work] += 1


def _interleaved_order(pp: int, rank: int, batches: int) -> Iterator[Work]:
    """Forward passes until the last stage's first gradients arrive, then forward and backward in turn; both take one
    stage for a round of micro-batches, then the other."""
    round_size = batches // max(1, batches // pp)
    ahead = min(round_size + 2 * (pp - 1 - rank), 2 * batches)
    for number in range(ahead):
        yield Work("F", number // round_size % 2)
    for number in range(2 * batches):
        if ahead + number < 2 * batches:
            yield Work("F", (ahead + number) // round_size % 2)
        yield Work("B", 1 - number // round_size % 2)


def _zbv_order(pp: int, rank: int, batches: int) -> Iterator[Work]:
    """arXiv:2401.10241, section 6, as torch.distributed.pipelining writes it out."""
    count = max(2 * pp - 1, batches)
    backward = (Work("I", 0), Work("W", 0)), (Work("I", 1), Work("W", 1))
    yield from [Work("F", 0)] * (2 * (pp - rank) - 1)
    yield from [Work("F", 1), Work("F", 0)] * rank
    for _ in range(pp - rank):
        yield Work("F", 1)
        yield from backward[1]
    forward, behind = 2 * pp - 1 - rank, pp
    while behind < forward or forward < count:
        if forward < count:
            yield Work("F", 0)
            forward += 1
        yield from backward[0]
        yield Work("F", 1)
        yield from backward[1]
        behind += 1
    yield from [Work("I", 0), Work("I", 1)] * rank
    yield from backward[0] * (pp - rank)
    yield from [Work("W", 1)] * rank
    yield from [Work("W", 0)] * rank
