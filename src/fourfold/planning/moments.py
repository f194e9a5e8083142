"""What a rank holds beside weights and optimizer state at each moment of a step that may be its peak.

A step after the first: weights and optimizer state are there. Its peak is at one of these moments:

- the start of the forward pass, where FSDP has just gathered;
- its end, and the loss: everything that the forward pass keeps, and a chunk of logits;
- the start of the backward pass: what the last norm's backward pass works with, then what the last layer's does;
- its end: all gradients, and what the first layer's backward pass works with, or the embedding's gradient.

Gradients grow while activations shrink, both evenly, so the peak lies at an end. Under a pipeline several micro-batches
are in flight, most of them on the first rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fourfold.planning.gathered import Gathered
from fourfold.planning.in_flight import Flight, flights
from fourfold.planning.job import KEPT_CHUNK_TOKENS
from fourfold.planning.layer_sums import LayerSums
from fourfold.planning.rank_work import RankWork

_FORWARD_LOGIT_BYTES, _LOGIT_BYTES, _SHARED_LOGIT_BYTES = 8, 12, 8
"""Of one logit, fp32: with its log-softmax in the forward pass; while the loss is differentiated its log-softmax, the
gradient of that and its own; and where ranks share the vocabulary, the softmax and its gradient."""
_TAUGHT_LOGIT_BYTES, _TAUGHT_CHUNK, _TAUGHT_CHUNK_BYTES = 18, 8192, 16
"""Of one logit beside a teacher's, for half as many positions at a time: its own, its log-softmax and two gradients,
fp32, and the teacher's in bf16; and of so many tokens at a time what the divergence works with
(losses/distillation.py)."""

_LAST_NORM_BYTES, _LEARNING_NORM_BYTES = 20, 4
"""Of a number of the last hidden states: five tensors in fp32 that the backward pass of their norm has at one time, and
one more where its weight is trained."""


class Moment(NamedTuple):
    """Bytes by terms of a rank's memory."""

    gradients: int
    gathered: int
    activations: int
    logits: int = 0


def moments_of(work: RankWork) -> list[Moment]:
    """Each moment that may be the peak; the first is where FSDP has just gathered."""
    job, layers = work.job, work.layers
    gathered = Gathered.of(work)
    layer = int((layers.replayed + layers.working) * work.positions)
    entering = job.compute_bytes * work.shape.hidden * work.positions
    # a tied embedding's gradient beside the head's, to which it is added; or beside those of the micro-batches before
    added = work.stage.is_first and ((work.shape.tied and work.trained_head > 0) or work.batches > 1)
    summed = work.table * job.master_bytes if added and job.tuning == "full" and work.layout.shards == 1 else 0
    before_outer = work.gradients - work.outer.trained * job.master_bytes
    return [
        Moment(gathered.accumulated, gathered.begin + gathered.waiting, entering),
        *_around_the_loss(work, gathered, layer),
        Moment(gathered.accumulated or before_outer, gathered.end, layer + int(layers.entry * work.positions)),
        Moment(gathered.root_gradients, gathered.root + summed, entering),
    ]


def _around_the_loss(work: RankWork, gathered: Gathered, layer: int) -> Iterator[Moment]:
    """Where everything waits for its backward pass, with as many micro-batches in flight as there are at a time.

    Args:
        layer: bytes that the backward pass of a layer takes.
    """
    layers, c = work.layers, work.job.compute_bytes
    forward_logits, logits = _logit_bytes(work)
    head_gradient = work.trained_head * c if work.layout.shards == 1 else 0
    head_at_loss = head_gradient if work.head_beside_logits else 0
    hidden = work.shape.hidden * work.positions
    hidden_copies = c * hidden * (4 if work.stage.is_last else 1)
    last_norm = _LAST_NORM_BYTES + (_LEARNING_NORM_BYTES if work.job.tuning == "full" else 0)
    shared = work.layout.tp if work.layout.sequence_parallel else 1
    casts = (layers.part.cast + work.outer.cast) * c  # that autocast makes in a forward pass
    for flight in flights(work.layout, work.pp_rank, work.batches):
        gradients = int(gathered.accumulated * _begun(flight, layers))
        more = gathered.waiting if gradients else 0
        kept_layers = _kept_in_flight(work, flight)
        kept_all = kept_layers + hidden_copies
        kept_casts = _casts_in_flight(work, flight) * c
        if flight.forward and flight.ended:
            whole = gathered.forward + more + (max(kept_casts, casts) if casts else 0)
            yield Moment(gradients, whole, kept_all, forward_logits)
        beside = more + kept_casts
        if flight.ended:
            yield Moment(gradients, gathered.loss + beside + head_at_loss, kept_all, logits)
        working = layer
        if work.replays and flight.is_split:
            again = max(own.replayed for own, split in zip(layers.stages, flight.split, strict=True) if split)
            working = max(layer, int(again * work.positions))
        held = gathered.backward + beside + head_gradient
        if work.stage.is_last:
            if flight.ended:
                root = gathered.loss + beside + head_gradient
                yield Moment(gradients, root, kept_layers + last_norm * hidden // shared)
            # the gradient that is left belongs to what a layer works with; under tp copies stand for gathered inputs
            if work.layout.tp == 1:
                kept_all = kept_layers
        if layers.spared.layers:  # the last ones have all of theirs; the first that is computed again comes after them
            yield Moment(gradients, held, kept_all + working - int(layers.replayed * work.positions))
            kept_all -= int(layers.spared.kept * work.positions)
            gradients += int(_of_layers(layers, layers.spared.layers) * (gathered.root_gradients - gradients))
        yield Moment(gradients, held, kept_all + working)


def _logit_bytes(work: RankWork) -> tuple[int, int]:
    """Bytes of logits in the forward pass, and while the loss is differentiated."""
    job, own, scored = work.job, work.own_vocabulary, work.scored_at_once
    if job.teacher is not None:
        rows = min(scored, job.chunk // 2)
        taught = rows * (_TAUGHT_LOGIT_BYTES * own + _TAUGHT_CHUNK_BYTES * min(_TAUGHT_CHUNK, own))
        return taught, taught
    if work.layout.shares_vocabulary:
        return _FORWARD_LOGIT_BYTES * scored * own, _SHARED_LOGIT_BYTES * scored * own
    if job.engine == "eager":
        return _FORWARD_LOGIT_BYTES * scored * own, _LOGIT_BYTES * scored * own
    # in the compute dtype alone, and their gradient takes their place
    kept = work.scored if job.keeps_logits else scored
    made = min(kept, KEPT_CHUNK_TOKENS) if job.keeps_logits else scored
    changed = work.shape.changed_logits
    found = job.compute_bytes * (kept * max(changed, 1) + made * changed) * own
    return found, found


def _of_layers(layers: LayerSums, number: int) -> float:
    """So many of a rank's layers, as a share of them."""
    return number / sum(each.layers for each in layers.stages)


def _begun(flight: Flight, layers: LayerSums) -> float:
    """Of a rank's layers, the share whose weights have gradients."""
    there = sum(own.layers for own, begun in zip(layers.stages, flight.begun, strict=True) if begun)
    return _of_layers(layers, there)


def _kept_in_flight(work: RankWork, flight: Flight) -> int:
    """Bytes of all micro-batches that a rank keeps: activations, what stages have sent, and gradients that wait."""
    job, layers = work.job, work.layers
    wire = job.compute_bytes * work.shape.hidden * work.positions
    total = float(wire * flight.handed)
    for number, (own, held, split) in enumerate(zip(layers.stages, flight.held, flight.split, strict=True)):
        ends = work.stage.is_last and number == len(layers.stages) - 1
        sent = 0 if ends else wire  # until it is differentiated
        total += (own.kept * work.positions + sent) * held
        # of layers that are trained in full, the last result's gradient is what has been received
        received = 0 if ends or job.tuning != "full" else wire
        total += (own.split * work.positions - received) * split
    return int(total)


def _casts_in_flight(work: RankWork, flight: Flight) -> int:
    """Numbers of the copies that autocast has made of trained matrices, for every micro-batch anew; those of a layer
    that is computed again do not stay."""
    layers, outer = work.layers, work.outer
    if work.replays:
        return outer.cast + layers.spared.cast
    of_layers = sum(own.cast * held for own, held in zip(layers.stages, flight.held, strict=True))
    return of_layers + outer.cast * flight.held[-1]
