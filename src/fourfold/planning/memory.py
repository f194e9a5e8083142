"""The peak memory of a rank, term by term.

A step after the first: weights and optimizer state are there. Its peak is at one of these moments:

- the start of the forward pass, where FSDP has just gathered;
- its end, and the loss: everything that the forward pass keeps, and a chunk of logits;
- the start of the backward pass: the same, and what the last layer's backward pass works with;
- its end: all gradients, and what the first layer's backward pass works with, or the embedding's gradient.

Gradients grow while activations shrink, both evenly, so the peak lies at an end. Under a pipeline several micro-batches
are in flight, most of them on the first rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fourfold.planning.device import Device
from fourfold.planning.estimate import Memory
from fourfold.planning.in_flight import Flight, flights
from fourfold.planning.job import KEPT_CHUNK_TOKENS, Job, Recompute
from fourfold.planning.layer_sums import LayerSums, sum_layers
from fourfold.planning.layout import Layout
from fourfold.planning.reserved import Pools, gradients_may_join
from fourfold.planning.shape import ModelShape
from fourfold.planning.stages import min_microbatches
from fourfold.planning.states import Part, Stage, cut_numel, optimizer_bytes, outer_part, stage_of
from fourfold.planning.teacher import teacher_memory

_FORWARD_LOGIT_BYTES, _LOGIT_BYTES, _SHARED_LOGIT_BYTES = 8, 12, 8
"""Of one logit, fp32: with its log-softmax in the forward pass; while the loss is differentiated its log-softmax, the
gradient of that and its own; and where ranks share the vocabulary, the softmax and its gradient."""
_TAUGHT_LOGIT_BYTES, _TAUGHT_CHUNK, _TAUGHT_CHUNK_BYTES = 18, 8192, 16
"""Of one logit beside a teacher's, for half as many positions at a time: its own, its log-softmax and two gradients,
fp32, and the teacher's in bf16; and of so many tokens at a time what the divergence works with
(losses/distillation.py)."""
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
        device: what its context and kernels take; None for none of it (CPU).
    """
    ranks = range(layout.pp) if rank is None else (rank,)
    # the first rank has most micro-batches in flight, the last one the logits; those between are alike, unless a user
    # has dealt the layers out
    if rank is None and layout.pp > 3 and not layout.pp_layers:
        ranks = (0, 1, layout.pp - 1)
    found = [_of_rank(shape, job, layout, recompute, micro_batch, pp_rank, device) for pp_rank in ranks]
    return max(found, key=lambda memory: (memory.device, memory.allocated))


def _of_rank(
    shape: ModelShape,
    job: Job,
    layout: Layout,
    recompute: Recompute,
    micro_batch: int,
    pp_rank: int,
    device: Device | None,
) -> Memory:
    stage = stage_of(shape, job, layout, pp_rank)
    layers = sum_layers(shape, job, layout, stage, recompute)
    outer = outer_part(shape, job, layout.of_a_layer(), is_first=stage.is_first, is_last=stage.is_last)
    held = layers.part + outer
    positions = -(-micro_batch // layout.cp)
    batches = _micro_batches(job, layout, micro_batch)
    gradients = held.trained * job.master_bytes
    optimizer = optimizer_bytes(job, held.trained)
    moments = _moments(shape, job, layout, stage, layers, outer, positions, batches, pp_rank, gradients)
    held_teacher = 0
    if job.teacher is not None:
        taught = teacher_memory(job.teacher, job, layout, pp_rank, positions)
        held_teacher = taught.held
        moments = [
            moment._replace(gathered=moment.gathered + taught.head, activations=moment.activations + taught.states)
            for moment in moments
        ]
        moments.append(_Moment(0, taught.asked, taught.activations))
    peak = max(moments, key=sum)
    on_host = layout.offload
    terms = {
        "parameters": 0 if on_host == "params" else held.weights,
        "scales": held.scales,
        "gradients": peak.gradients,
        "optimizer": 0 if on_host != "none" else optimizer,
        "teacher": held_teacher,
        "gathered": peak.gathered,
        "activations": peak.activations,
        "logits": peak.logits,
        "buffers": (_WORKSPACE if device is not None else 0) + _received(shape, job, layout, stage, positions, batches),
        "context": 0 if device is None else _CONTEXT + (COMMUNICATOR if layout.world_size > 1 else 0),
    }
    terms["slack"], joins = 0, False
    if device is not None:
        lasting = sum(terms[name] for name in ("parameters", "scales", "optimizer", "teacher", "buffers"))
        reserved = {
            joined: pools.reserved(lasting)
            for joined, pools in _pools(shape, job, layout, layers, outer, positions, moments, gradients, stage)
        }
        joins = reserved.get(True, math.inf) < reserved[False]
        terms["slack"] = max(reserved[joins] - Memory(pp_rank, terms).allocated, 0)
    return Memory(pp_rank, terms, None if device is None else device.memory_bytes, joins)


def _pools(
    shape: ModelShape,
    job: Job,
    layout: Layout,
    layers: LayerSums,
    outer: Part,
    positions: int,
    moments: Sequence[_Moment],
    gradients: int,
    stage: Stage,
) -> Iterator[tuple[bool, Pools]]:
    """What comes and goes, by the stream that asks for it; with gradients apart, and joined if they may be."""
    unit, root = layers.largest, outer
    shared = layout.tp > 1 and layout.loss_parallel
    scored = min(job.chunk, _scored(job, stage, positions))
    logits = 4 * scored * (-(-shape.vocab // layout.tp) if shared else shape.vocab)
    if layout.shards == 1:
        moving = max(sum(moment) for moment in moments)
        largest = _largest_gradient(shape, job, layout, stage)
        if job.engine != "eager":  # few blocks come and go within a compiled layer
            largest = 0
            logits = logits if shared else 0  # a compiled loss makes nothing in fp32; one that ranks share is not
        yield False, Pools(moving, 0, 0, logits, largest)
        return
    reduced = 4 if job.is_mixed else job.compute_bytes
    arriving = root.whole + unit.whole
    sent = (root.whole_trained + unit.whole_trained) * job.compute_bytes // layout.shards if job.is_mixed else 0
    at_once = [arriving, *(unit.whole if m.gathered >= root.whole + 2 * unit.whole else 0 for m in moments[1:])]
    root_sent = root.whole_trained * reduced
    whole_gradients = layout.pp > 1 or layout.zero == 1
    for joined in (False, True) if gradients_may_join(gradients, root_sent) else (False,):
        there = joined or whole_gradients
        moving = max(
            sum(moment) - (0 if there else moment.gradients) - still_arriving
            for moment, still_arriving in zip(moments, at_once, strict=True)
        )
        largest = root_sent
        if moving - int(_LASTING_ROOT * root.whole) > largest:
            # it finds room where activations were; less of it between the keys and values that cp ranks exchange in
            # fp32, or between gradients where little else is kept and head and embedding are two
            among = joined and layers.replayed > 0 and layout.pp == layout.cp == 1 and not shape.tied
            halved = job.is_mixed and (among or layout.cp > 1)
            largest = largest // 2 if halved else largest if among else 0
        gathering = arriving + unit.whole + sent
        yield joined, Pools(moving, gathering, 0 if joined else gradients, logits, largest)


def _largest_gradient(shape: ModelShape, job: Job, layout: Layout, stage: Stage) -> int:
    """Bytes of the largest whole gradient of a rank that does not shard."""
    if job.tuning == "lora":
        return 0
    there = [weight for weight in shape.outer if stage.is_first or stage.is_last] if job.tuning == "full" else []
    weights = [*there, *(weight for kind in shape.kinds for weight in kind.weights)]
    return max(math.prod(cut_numel(shape, layout, weight)) for weight in weights) * job.master_bytes


class _Moment(NamedTuple):
    """What is held beside weights and optimizer state at one time, bytes by terms of a rank's memory."""

    gradients: int
    gathered: int
    activations: int
    logits: int = 0


def _moments(
    shape: ModelShape,
    job: Job,
    layout: Layout,
    stage: Stage,
    layers: LayerSums,
    outer: Part,
    positions: int,
    batches: int,
    pp_rank: int,
    gradients: int,
) -> list[_Moment]:
    """Each moment that may be the peak; the first is where FSDP has just gathered."""
    c, hidden = job.compute_bytes, shape.hidden
    table = shape.vocab * hidden // layout.tp
    head = table if job.tuning == "full" and stage.is_last else 0
    head_at_loss = head if _head_beside_logits(job, layout, stage, positions) else 0
    sharded = _Sharded.of(job, layout, layers, outer, head, head_at_loss, gradients, batches)
    layer = int((layers.replayed + layers.working) * positions)
    # gradients of merged weights, one matrix at a time
    layer += layers.largest.merged * c * (4 if layers.replayed > 0 else 1) // 3
    entering = int(c * hidden * positions)
    # a tied embedding's gradient beside the head's, to which it is added; or beside those of the micro-batches before
    added = stage.is_first and ((shape.tied and head > 0) or batches > 1)
    summed = table * job.master_bytes if added and job.tuning == "full" and layout.shards == 1 else 0
    before_outer = gradients - outer.trained * job.master_bytes
    return [
        _Moment(sharded.accumulated, sharded.gathering + sharded.waiting, entering),
        *_waiting_moments(shape, job, layout, stage, layers, outer, sharded, positions, batches, pp_rank, layer),
        _Moment(sharded.accumulated or before_outer, sharded.end, layer + int(layers.entry * positions)),
        _Moment(sharded.root_gradients, sharded.root + summed, entering),
    ]


def _scored(job: Job, stage: Stage, positions: int) -> int:
    """Positions of a micro-batch that have logits on a rank."""
    return max(int(positions * job.trained_share), 1) if stage.is_last and job.trained_share else 0


def _head_beside_logits(job: Job, layout: Layout, stage: Stage, positions: int) -> bool:
    """Whether the gradient of the head is there beside logits: those of the chunks after the first, or those that ranks
    share, which are kept until both gradients are made."""
    return _scored(job, stage, positions) > job.chunk or (layout.tp > 1 and layout.loss_parallel)


def _waiting_moments(
    shape: ModelShape,
    job: Job,
    layout: Layout,
    stage: Stage,
    layers: LayerSums,
    outer: Part,
    sharded: _Sharded,
    positions: int,
    batches: int,
    pp_rank: int,
    layer: int,
) -> Iterator[_Moment]:
    """Around the loss, where everything waits for its backward pass.

    Args:
        layer: bytes that the backward pass of a layer takes.
    """
    c, hidden = job.compute_bytes, shape.hidden
    replays = layers.replayed > 0
    shared = layout.tp > 1 and layout.loss_parallel
    scored = min(job.chunk, _scored(job, stage, positions))
    own = -(-shape.vocab // layout.tp) if shared else shape.vocab
    forward_logits, logits = _FORWARD_LOGIT_BYTES * scored * own, _LOGIT_BYTES * scored * own
    if shared:
        logits = _SHARED_LOGIT_BYTES * scored * own
    elif job.engine != "eager":
        # in the compute dtype alone, and their gradient takes their place
        kept = _scored(job, stage, positions) if job.keeps_logits else scored
        made = min(kept, KEPT_CHUNK_TOKENS) if job.keeps_logits else scored
        forward_logits = logits = c * (kept * max(shape.changed_logits, 1) + made * shape.changed_logits) * own
    if job.teacher is not None:
        rows = min(scored, job.chunk // 2)
        logits = rows * (_TAUGHT_LOGIT_BYTES * own + _TAUGHT_CHUNK_BYTES * min(_TAUGHT_CHUNK, own))
        forward_logits = logits
    whole_head = job.tuning == "full" and stage.is_last and layout.shards == 1
    head_gradient = shape.vocab * hidden // layout.tp * c if whole_head else 0
    head_at_loss = head_gradient if _head_beside_logits(job, layout, stage, positions) else 0
    hidden_copies = int(c * hidden * positions * (4 if stage.is_last else 1))
    casts = (layers.part.cast + outer.cast) * c  # that autocast makes in a forward pass
    for flight in flights(layout, pp_rank, batches):
        gradients = int(sharded.accumulated * _begun(flight, layers))
        more = sharded.waiting if gradients else 0
        kept_all = _kept_in_flight(job, shape, layout, stage, layers, flight, positions) + hidden_copies
        kept_casts = _casts_in_flight(layers, outer, flight) * c
        if replays:
            kept_casts = (outer.cast + layers.spared.cast) * c
        if flight.forward and flight.ended:
            gathered = sharded.forward + more + (max(kept_casts, casts) if casts else 0)
            yield _Moment(gradients, gathered, kept_all, forward_logits)
        beside = more + kept_casts
        if flight.ended:
            yield _Moment(gradients, sharded.loss + beside + head_at_loss, kept_all, logits)
        working = layer
        if replays and flight.is_split:
            again = max(own.replayed for own, split in zip(layers.stages, flight.split, strict=True) if split)
            working = max(layer, int(again * positions))
        held = sharded.backward + beside + head_gradient
        if layers.spared.layers:  # the last ones have all of theirs; the first that is computed again comes after them
            yield _Moment(gradients, held, kept_all + working - int(layers.replayed * positions))
            kept_all -= int(layers.spared.kept * positions) + layers.spared.merged * c
            gradients += int(_of_layers(layers, layers.spared.layers) * (sharded.root_gradients - gradients))
        yield _Moment(gradients, held, kept_all + working)


def _of_layers(layers: LayerSums, number: int) -> float:
    """So many of a rank's layers, as a share of them."""
    return number / sum(each.layers for each in layers.stages)


def _begun(flight: Flight, layers: LayerSums) -> float:
    """Of a rank's layers, the share whose weights have gradients."""
    numbers = [each.layers for each in layers.stages]
    there = sum(number for number, begun in zip(numbers, flight.begun, strict=True) if begun)
    return there / sum(numbers)


def _kept_in_flight(
    job: Job, shape: ModelShape, layout: Layout, stage: Stage, layers: LayerSums, flight: Flight, positions: int
) -> int:
    """Bytes of all micro-batches that a rank keeps: activations, what stages have sent, and gradients that wait."""
    wire = job.compute_bytes * shape.hidden * positions
    replays = layers.replayed > 0
    total = float(wire * flight.handed)
    for number, (own, held, split) in enumerate(zip(layers.stages, flight.held, flight.split, strict=True)):
        ends = stage.is_last and number == len(layers.stages) - 1
        sent = 0 if ends else wire  # until it is differentiated
        merged = (layers.spared.merged if replays else own.merged) * job.compute_bytes
        total += (own.kept * positions + merged + sent) * held
        # of layers that are trained in full, the last result's gradient is what has been received
        received = 0 if ends or job.tuning != "full" else wire
        total += (own.split * positions - received) * split
    return int(total)


def _casts_in_flight(layers: LayerSums, outer: Part, flight: Flight) -> int:
    """Numbers of the copies that autocast has made of trained matrices, for every micro-batch anew."""
    of_layers = sum(own.cast * held for own, held in zip(layers.stages, flight.held, strict=True))
    return of_layers + outer.cast * flight.held[-1]


@dataclass(frozen=True, slots=True)
class _Sharded:
    """What FSDP has whole, and gradients that wait; bytes.

    Attributes:
        gathering: at the start of the forward pass, where what was gathered is also still as it arrived.
        forward, loss, backward, end, root: whole weights and gradients at each moment.
        accumulated: gradients of the micro-batches before.
        waiting: what the reduction of the micro-batch before still holds.
        root_gradients: gradients at the last moment, that of the embedding.
    """

    gathering: int
    forward: int
    loss: int
    backward: int
    end: int
    root: int
    accumulated: int
    waiting: int
    root_gradients: int

    @classmethod
    def of(
        cls,
        job: Job,
        layout: Layout,
        layers: LayerSums,
        root: Part,
        head: int,
        head_at_loss: int,
        gradients: int,
        batches: int,
    ) -> _Sharded:
        """The figures of a layout; of one without shards nothing is gathered.

        Args:
            head, head_at_loss: elements of the head's gradient after the loss, and beside the last chunk's logits.
        """
        c = job.compute_bytes
        accumulated = gradients if batches > 1 else 0
        if layout.shards == 1:
            return cls(0, 0, 0, 0, layers.largest.cast * c, 0, accumulated, 0, gradients)
        reduced = 4 if job.is_mixed else c
        unit, everything = layers.largest, layers.part.whole + root.whole
        whole_trained = layers.part.whole_trained + root.whole_trained
        if layout.pp > 1:  # all stays gathered, and gradients whole, until the end of the step
            whole = whole_trained * reduced
            sending = max(unit.whole_trained, root.whole_trained) * reduced
            loss, backward = everything + head_at_loss * c, everything + (head + unit.whole_trained) * c
            return cls(everything, everything, loss, backward, everything, everything + sending, whole, 0, whole)
        kept = root.whole if layout.reshards else everything
        root_sent = root.whole_trained * (c + reduced)
        waiting = 0
        if layout.zero == 1 and batches > 1:
            accumulated = whole_trained * reduced
        elif batches > 1:
            waiting = root.whole_trained * reduced
        # a unit that is gathered, the next one on its way, its whole gradients, and those of the one before, on the way
        units = (2 if layout.reshards else 0) * unit.whole
        sent = unit.whole_trained * (c + reduced)
        backward = kept + units + sent + head * c
        end = root.whole + unit.whole + sent + head * c
        before_root = gradients - (root.trained * job.master_bytes if batches == 1 else 0)
        if layout.zero == 1 and batches > 1:
            before_root = gradients + root.whole_trained * reduced
        root_end = root_sent or root.whole
        gathering = 2 * (root.whole + unit.whole)
        return cls(gathering, kept, kept + head_at_loss * c, backward, end, root_end, accumulated, waiting, before_root)


def _received(shape: ModelShape, job: Job, layout: Layout, stage: Stage, positions: int, batches: int) -> int:
    """Where a pipeline's stages receive: hidden states and gradients of every micro-batch of a step."""
    if layout.pp == 1:
        return 0
    stages = len(stage.counts)
    received = 2 * stages - (1 if stage.is_first else 0) - (1 if stage.is_last else 0)
    return received * batches * job.compute_bytes * shape.hidden * positions


def _micro_batches(job: Job, layout: Layout, micro_batch: int) -> int:
    """Of a step, on one data-parallel rank."""
    count = max(-(-job.tokens_per_step // (layout.dp * micro_batch)), 1)
    return max(count, min_microbatches(layout)) if layout.pp > 1 else count
