"""The peak memory of a rank, term by term: what it holds all through a step, the most of what comes and goes
(planning/moments.py), and what the allocator has reserved beside (planning/reserved.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fourfold.planning.device import Device
from fourfold.planning.engines import has_own_attention
from fourfold.planning.estimate import Memory
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.moments import Moment, moments_of
from fourfold.planning.rank_work import RankWork
from fourfold.planning.reserved import Pools, gradients_may_join
from fourfold.planning.shape import ModelShape
from fourfold.planning.states import cut_numel, optimizer_bytes
from fourfold.planning.teacher import teacher_memory

_CONTEXT = 600 << 20
"""CUDA context, kernels and libraries, outside the allocator (an H100 with CUDA 13: about 0.6 GiB)."""
COMMUNICATOR = 450 << 20
"""NCCL's buffers for the communicators of a job with several ranks."""
_WORKSPACE = 32 << 20
"""cuBLAS's workspace, which PyTorch takes from the allocator (Hopper)."""

_LASTING_ROOT = 1.5
"""What of FSDP's root unit is there all through a step, with the head's gradient, in units of it: the rest is where a
large block finds room. From the same runs as `planning/reserved.py`."""


def estimate_memory(
    shape: ModelShape,
    job: Job,
    layout: Layout,
    recompute: Recompute,
    micro_batch: int,
    *,
    rank: int | None = None,
    device: Device | None = None,
) -> Memory:
    """Memory of one rank at its peak.

    Args:
        micro_batch: positions of a micro-batch on a data-parallel rank, before cp ranks share them.
        rank: of the pipeline; None for the most loaded one.
        device: what its context and kernels take, and how its attention keeps keys; None for none of it (CPU).
    """
    if layout.cp > 1 and device is not None and has_own_attention(device):
        job = replace(job, keys_once=True)
    ranks = range(layout.pp) if rank is None else (rank,)
    # the first rank has most micro-batches in flight, the last one the logits; those between are alike, unless a user
    # has dealt the layers out
    if rank is None and layout.pp > 3 and not layout.pp_layers:
        ranks = (0, 1, layout.pp - 1)
    works = (RankWork.of(shape, job, layout, recompute, micro_batch, pp_rank) for pp_rank in ranks)
    return max((_of_rank(work, device) for work in works), key=lambda memory: (memory.device, memory.allocated))


def _of_rank(work: RankWork, device: Device | None) -> Memory:
    job, offload, held = work.job, work.layout.offload, work.held
    moments, held_teacher = moments_of(work), 0
    if job.teacher is not None:
        taught = teacher_memory(job.teacher, job, work.layout, work.pp_rank, work.positions)
        held_teacher = taught.held
        moments = [
            moment._replace(gathered=moment.gathered + taught.head, activations=moment.activations + taught.states)
            for moment in moments
        ]
        moments.append(Moment(0, taught.asked, taught.activations))
    peak = max(moments, key=sum)
    terms = {
        "parameters": 0 if offload == "params" else held.weights,
        "scales": held.scales,
        "gradients": peak.gradients,
        "optimizer": 0 if offload != "none" else optimizer_bytes(job, held.trained),
        "teacher": held_teacher,
        "gathered": peak.gathered,
        "activations": peak.activations,
        "logits": peak.logits,
        "buffers": (_WORKSPACE if device is not None else 0) + _received(work),
        "context": 0 if device is None else _CONTEXT + (COMMUNICATOR if work.layout.world_size > 1 else 0),
    }
    terms["slack"], joins = 0, False
    if device is not None:
        lasting = sum(terms[name] for name in ("parameters", "scales", "optimizer", "teacher", "buffers"))
        reserved = {joined: pools.reserved(lasting) for joined, pools in _pools(work, moments)}
        joins = reserved.get(True, math.inf) < reserved[False]
        terms["slack"] = max(reserved[joins] - Memory(work.pp_rank, terms).allocated, 0)
    return Memory(work.pp_rank, terms, None if device is None else device.memory_bytes, joins)


def _pools(work: RankWork, moments: Sequence[Moment]) -> Iterator[tuple[bool, Pools]]:
    """What comes and goes, by the stream that asks for it; with gradients apart, and joined if they may be."""
    if work.layout.shards == 1:
        yield False, _own_pools(work, moments)
        return
    job, layout, unit, root = work.job, work.layout, work.layers.largest, work.outer
    reduced = 4 if job.is_mixed else job.compute_bytes
    arriving = root.whole + unit.whole
    sent = (root.whole_trained + unit.whole_trained) * job.compute_bytes // layout.shards if job.is_mixed else 0
    at_once = [arriving, *(unit.whole if m.gathered >= root.whole + 2 * unit.whole else 0 for m in moments[1:])]
    root_sent = root.whole_trained * reduced
    whole_gradients = layout.pp > 1 or layout.zero == 1
    for joined in (False, True) if gradients_may_join(work.gradients, root_sent) else (False,):
        there = joined or whole_gradients
        moving = max(
            sum(moment) - (0 if there else moment.gradients) - still_arriving
            for moment, still_arriving in zip(moments, at_once, strict=True)
        )
        largest = root_sent
        if moving - int(_LASTING_ROOT * root.whole) > largest:
            # it finds room where activations were; less of it between gradients where little else is kept and head and
            # embedding are two, and none between the keys of cp ranks that a layer has once
            among = joined and work.replays and layout.pp == layout.cp == 1 and not work.shape.tied
            halved = job.is_mixed and (among or (layout.cp > 1 and not job.keys_once))
            largest = largest // 2 if halved else largest if among or job.keys_once else 0
        if job.keys_once and layout.cp_method == "allgather":
            largest += 2 * work.gathered_keys  # theirs and their gradients' come and go between what stays
        gathering = arriving + unit.whole + sent
        yield joined, Pools(moving, gathering, 0 if joined else work.gradients, _wide_logits(work), largest)


def _own_pools(work: RankWork, moments: Sequence[Moment]) -> Pools:
    """The same of a rank that does not shard: its own stream alone."""
    moving = max(sum(moment) for moment in moments)
    if work.job.engine == "eager":
        return Pools(moving, 0, 0, _wide_logits(work), _largest_gradient(work))
    # few blocks come and go within a compiled layer; its loss makes nothing in fp32, but where ranks share it
    return Pools(moving, 0, 0, _wide_logits(work) if work.layout.shares_vocabulary else 0, 0)


def _wide_logits(work: RankWork) -> int:
    """Bytes of a chunk of logits in fp32."""
    return 4 * work.scored_at_once * work.own_vocabulary


def _largest_gradient(work: RankWork) -> int:
    """Bytes of the largest whole gradient of a rank that does not shard."""
    shape, job, stage = work.shape, work.job, work.stage
    if job.tuning == "lora":
        return 0
    there = [weight for weight in shape.outer if stage.is_first or stage.is_last] if job.tuning == "full" else []
    weights = [*there, *(weight for kind in shape.kinds for weight in kind.weights)]
    return max(math.prod(cut_numel(shape, work.layout, weight)) for weight in weights) * job.master_bytes


def _received(work: RankWork) -> int:
    """Where a pipeline's stages receive: hidden states and gradients of every micro-batch of a step."""
    if work.layout.pp == 1:
        return 0
    stage = work.stage
    received = 2 * len(stage.counts) - (1 if stage.is_first else 0) - (1 if stage.is_last else 0)
    return received * work.batches * work.job.compute_bytes * work.shape.hidden * work.positions
