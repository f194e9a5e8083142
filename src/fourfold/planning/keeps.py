"""What a run keeps where there is room, though it could do without: each choice takes memory and spares time, and none
changes a result. The planner and a run that has loaded its model choose alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fourfold.base.bisection import largest_that
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout

STEP_SHARE = 0.93
"""Of the memory that is free beside the loaded model, what a step may take by prediction, unless it was planned with a
margin of its own; the rest is for what libraries allocate later, and for what the prediction is off by."""


@dataclass(frozen=True, slots=True)
class Keeps:
    """What is kept.

    Attributes:
        unpacked: 4-bit weights, unpacked once (models/unpacked.py).
        logits: those of all chunks, for the backward pass, instead of being made again.
        spared: activations of so many layers, the last ones, where others are computed again.
        copies: of trained matrices in the compute dtype, from update to update (models/masters.py).
    """

    unpacked: bool = False
    logits: bool = False
    spared: int = 0
    copies: bool = False

    def job(self, job: Job) -> Job:
        """A job that keeps it."""
        bits = None if self.unpacked else job.bits
        return replace(job, bits=bits, keeps_logits=self.logits, spared=self.spared, keeps_copies=self.copies)


NOTHING = Keeps()


def what_fits(
    job: Job,
    layout: Layout,
    recompute: Recompute,
    micro_batch: int,
    layers: int,
    fits: Callable[[Keeps], bool],
    *,
    spares: bool = True,
) -> Keeps:
    """All that there is room for, one after the other.

    Args:
        job: as what runs its layers has it, and nothing kept.
        micro_batch: positions of the largest micro-batch on a data-parallel rank.
        layers: of the model.
        fits: whether a step does that keeps so much.
        spares: some layers may be computed again, and others not.
    """
    keeps = NOTHING
    if may_unpack(job, layout) and fits(replace(keeps, unpacked=True)):
        keeps = replace(keeps, unpacked=True)
    if may_keep_logits(job, layout) and micro_batch > job.chunk and fits(replace(keeps, logits=True)):
        keeps = replace(keeps, logits=True)
    if spares and may_spare(job, layout, recompute):
        keeps = replace(keeps, spared=largest_that(lambda count: fits(replace(keeps, spared=count)), layers - 1))
    if may_keep_copies(job, layout) and fits(replace(keeps, copies=True)):
        keeps = replace(keeps, copies=True)
    return keeps


def room_for_step(free: int) -> int:
    """Of the bytes that are free beside the loaded model, those that a step may take by prediction."""
    return int(STEP_SHARE * free)


def may_unpack(job: Job, layout: Layout) -> bool:
    """Whether 4-bit weights may be unpacked once and kept.

    Not where ranks gather them, of which packed ones are a quarter to send, nor where a backward pass has two parts,
    whose layers are PEFT's own, nor where the least memory is asked for.
    """
    has_its_own = layout.shards == 1 and not layout.splits_backward and layout.offload == "none"
    return job.bits == 4 and has_its_own and not job.host_embedding


def may_spare(job: Job, layout: Layout, recompute: Recompute) -> bool:
    """Whether nothing may be computed again in some layers where others are.

    Not in pipelines; nor under freeze tuning, where few layers keep anything, and those are the last ones.
    """
    return recompute != "none" and layout.pp == 1 and job.tuning != "freeze"


def may_keep_logits(job: Job, layout: Layout) -> bool:
    """Whether logits may be kept for the backward pass.

    That is where the head is trained, and layers compiled, whose loss makes them in the compute dtype alone
    (models/token_nll.py); not where the least memory is asked for.
    """
    whole = layout.tp == 1 and layout.pp == 1 and not job.host_embedding
    return job.tuning == "full" and job.engine != "eager" and whole and job.trained_share > 0 and not job.teacher


def may_keep_copies(job: Job, layout: Layout) -> bool:
    """Whether copies of trained matrices in the compute dtype may be kept.

    That is where compiled layers copy for themselves, and the optimizer writes the copies with the masters; not where
    the least memory is asked for.
    """
    whole = layout.tp == 1 and layout.pp == 1 and layout.shards == 1 and layout.offload == "none"
    return whole and job.copies_itself and job.optim == "adamw_torch" and not job.host_embedding
