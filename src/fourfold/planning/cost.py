"""How long an optimizer step takes under a layout, without running it.

A step is the sum over the busiest rank of the pipeline: its layers, the embedding on the first stage, the head on the
last one. Layers of one kind cost the same, so each kind is timed once. Computation and communication of the same layer
overlap where the engine lets them (weights and gradients of data parallelism); what tensor, context and expert
parallelism send is waited for.

Assumed: even routers, documents as long as the job's sequence, and no rank that is slower than others.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from fourfold.planning.data_parallel import Exchange, RankWeights, WeightedLayer, exchange_weights
from fourfold.planning.engines import ENGINES, Engine, engine_in
from fourfold.planning.estimate import Cost
from fourfold.planning.flops import Mode, mode_of, model_flops
from fourfold.planning.hardware import Cluster
from fourfold.planning.job import Job, Recompute
from fourfold.planning.kernels import (
    HOST_GROUP,
    HOST_GROUP_LAYER,
    Place,
    Seconds,
    head_seconds,
    layer_seconds,
    stream_seconds,
)
from fourfold.planning.layer_sums import spared_kinds
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.stages import min_microbatches, num_stages, round_microbatches, stage_layers, stages_of_rank
from fourfold.planning.traffic import (
    HOST_LINK_BYTES_PER_S,
    Groups,
    Sent,
    Unit,
    groups_of,
    layer_sent,
    layer_unit,
    outer_sent,
    outer_unit,
    pipeline_sends,
)

OVERLAP_COST = 0.6
"""Of the time that communication is hidden, at the speed of the device's own link, what computation beside it loses.
Fitted to 14 jobs with fsdp on 4 H100 (benchmarks/results/multi_gpu_4xh100.json): with 1.0 they are off by -6 to +23 %,
with 0.6 by -9 to +15. In a trace of one (Llama-3-8B in full, compiled, 6,144 tokens a rank) 240 ms of 702 were
exchange, 20 of them alone, and the products beside it a tenth slower: kernels of NCCL hold multiprocessors, share the
memory's speed and the card's power."""
_NO_GAIN_PP = 4
"""Ranks from which on interleaved stages that share a group save no bubble; see `bubble_seconds`."""
_INTERLEAVED_COST = 1.15
"""What computation of a micro-batch takes beside messages of interleaved stages that have groups of their own: receives
that wait hold multiprocessors. 4 H100: 0.115 s a micro-batch and 1.10 to 1.16 s a step of eight, 1f1b 0.104 and 1.10 to
1.12."""
OPTIMIZER_NUMBERS = {"adamw_8bit": 4.0, "sgd": 3.0, "adafactor": 4.0}
"""Numbers of the master dtype that an optimizer reads and writes for each trained one; see _ADAMW_NUMBERS."""
_ADAMW_NUMBERS = 7.0
"""Weight, gradient and two moments read; weight and moments written."""
_NORM_NUMBERS, _SCALING_NUMBERS = 1.0, 2.0
"""Gradients are read for their norm, and to be clipped read and written once more; AdamW on a GPU clips in its own pass
(parallel/adamw_kernel.py)."""
HOST_MEMORY_BYTES_PER_S = 200e9
"""Of a node's memory, what all its cores attain together: assumed, two sockets of eight DDR4-3200 channels at half of
their 410 GB/s."""


@dataclass(frozen=True, slots=True)
class StepCut:
    """How a data-parallel rank cuts a step.

    Attributes:
        count: micro-batches.
        tokens: positions of each, before cp ranks share them.
    """

    count: int
    tokens: float


def cut_step(job: Job, layout: Layout, micro_batch: int) -> StepCut:
    """The micro-batches of the rank with most samples; where a pipeline needs more than there are samples, those that
    fill up cost as much as one sample."""
    tokens = math.ceil(job.sequences_per_step / layout.dp) * job.sequence
    count = math.ceil(tokens / micro_batch)
    if layout.pp > 1:
        count = round_microbatches(layout, max(count, min_microbatches(layout)))
    return StepCut(count, max(tokens / count, float(min(job.sequence, micro_batch))))


def bubble_seconds(layout: Layout, forward: float, input_grad: float, weight_grad: float) -> float:
    """What a rank of a pipeline idles in a step, from its times for one micro-batch over all its stages.

    With t their sum: (p - 1) t for gpipe and 1f1b. With two interleaved stages a rank it would be half of that
    (arXiv:2104.04473, sections 2.2.1 and 2.2.2), and is for p = 2 or where messages have groups of their own: 4 H100
    measured 1.03 times that. In one group torch's runtime of several stages gives every send and receive to one stream
    in a fixed order, where a send waits behind a receive whose sender is still computing. Going through that order
    gives 1.0 to 1.1 times (p - 1) t for p = 4, and more beyond; 4 H100 measured 0.995 and 1.18.
    zbv has two stages a rank, too, and lets gradients of weights fill what is left: (p - 1) / 2 (F + B - 2 W), nothing
    if the three take equally long (arXiv:2401.10241, section 6, with the terms of its ZB-H2 for halves of a stage).
    """
    p = layout.pp
    if p == 1:
        return 0.0
    if layout.pp_schedule == "zbv":
        return (p - 1) / 2 * max(forward + input_grad - 2 * weight_grad, 0.0)
    share = 1.0
    if num_stages(layout) > p:
        share = 0.5 if layout.overlaps_p2p else min(p / _NO_GAIN_PP, 1.0)
    return share * (p - 1) * (forward + input_grad + weight_grad)


def bubble_share(idle_s: float, busy_s: float) -> float:
    """Share of the time that is idle."""
    return idle_s / (idle_s + busy_s) if idle_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank of the pipeline runs.

    Attributes:
        layers: (kind, what is trained in it, how many).
        first, last: whether the first and the last stage are here.
        walked: small operators of the host for each group of weights of a layer, see `kernels.HOST_GROUP`.
    """

    layers: tuple[tuple[int, Mode, int], ...]
    first: bool
    last: bool
    walked: float = 0.0


@lru_cache(maxsize=1024)
def rank_loads(order: tuple[int, ...], job: Job, layout: Layout) -> tuple[RankLoad, ...]:
    """The different loads of a pipeline's ranks.

    Args:
        order: the kind of each layer.
        layout: of which the pipeline counts.
    """
    stages = stage_layers(layout, len(order))
    loads: list[RankLoad] = []
    for rank in range(layout.pp):
        own = stages_of_rank(layout, rank)
        numbers = [number for stage in own for number in stages[stage]]
        counts: Counter[tuple[int, Mode]] = Counter((order[n], mode_of(job, n, len(order))) for n in numbers)
        layers: list[tuple[int, Mode, int]] = [(*key, count) for key, count in counts.items()]
        loads.append(RankLoad(tuple(layers), 0 in own, len(stages) - 1 in own, _walked(layout, stages, own)))
    return tuple(dict.fromkeys(loads))


def _walked(layout: Layout, stages: Sequence[range], own: Sequence[int]) -> float:
    """Mean over a rank's layers; the first stage makes both kinds of gradients at once."""
    if not layout.splits_backward:
        return 0.0
    lengths = {stage: len(stages[stage]) for stage in own}
    total = sum(size * (HOST_GROUP + HOST_GROUP_LAYER * size) for stage, size in lengths.items() if stage)
    return total / sum(lengths.values())


@dataclass(frozen=True, slots=True)
class _LayerCost:
    """One kind of layer: time, what it sends, and FSDP's and DDP's unit."""

    kind: int
    count: int
    seconds: Seconds
    sent_forward: Sent
    sent_backward: Sent
    unit: Unit


class _Rank:
    """One rank's step; what is asked for several times is computed once."""

    def __init__(
        self,
        shape: ModelShape,
        job: Job,
        layout: Layout,
        cluster: Cluster,
        recompute: Recompute,
        cut: StepCut,
        engine: Engine,
        groups: Groups,
        load: RankLoad,
    ) -> None:
        self.shape, self.job, self.layout, self.cluster = shape, job, layout, cluster
        self.recompute: Recompute = recompute
        self.cut, self.engine, self.groups, self.load = cut, engine, groups, load
        self.tokens = cut.tokens / layout.cp

    @cached_property
    def layers(self) -> list[_LayerCost]:
        """Each kind of layer that this rank has."""
        place, device = Place.of(self.layout, self.tokens, self.load.walked), self.cluster.device
        found: list[_LayerCost] = []
        spared = spared_kinds(self.shape, self.job, self.layout, self.recompute)
        job = replace(self.job, spared=0)  # so that what is computed once is found again
        for kind, mode, count in self.load.layers:
            few = min(spared[kind], count)
            parts: tuple[tuple[Recompute, int], ...] = ((self.recompute, count - few), ("none", few))
            for recompute, number in parts:
                if not number:
                    continue
                seconds = layer_seconds(self.shape, kind, mode, job, place, recompute, device, self.engine)
                forward, backward = layer_sent(
                    self.shape, self.shape.kinds[kind], job, self.layout, self.groups, self.cluster, self.tokens, mode,
                    recompute,
                )  # fmt: skip
                unit = layer_unit(self.shape, kind, job, mode, self.layout)
                found.append(_LayerCost(kind, number, seconds, forward, backward, unit))
        return found

    @cached_property
    def outer(self) -> Unit:
        """Embedding, last norm and head, as far as they are here."""
        return outer_unit(self.shape, self.job, self.layout, first=self.load.first, last=self.load.last)

    @cached_property
    def head(self) -> Seconds:
        """Of logits and loss."""
        if not self.load.last:
            return Seconds(0.0, 0.0, 0.0)
        layout, device = self.layout, self.cluster.device
        shared = layout.shares_vocabulary
        return head_seconds(self.shape, self.job, self.tokens, layout.tp, device, shares_loss=shared)

    @cached_property
    def outer_sent(self) -> Sent:
        """What tp ranks exchange outside layers."""
        return outer_sent(
            self.shape, self.job, self.layout, self.groups, self.cluster, self.tokens,
            stages=num_stages(self.layout) // self.layout.pp, first=self.load.first, last=self.load.last,
        )  # fmt: skip

    @cached_property
    def passes(self) -> Seconds:
        """Computation of one micro-batch."""
        forward = self.head.forward + sum(each.count * each.seconds.forward for each in self.layers)
        backward = self.head.backward + sum(each.count * each.seconds.backward for each in self.layers)
        weight_grad = self.head.weight_grad + sum(each.count * each.seconds.weight_grad for each in self.layers)
        beside = _INTERLEAVED_COST if self.layout.overlaps_p2p else 1.0
        return Seconds(beside * forward, beside * backward, beside * weight_grad)

    @cached_property
    def waits(self) -> Seconds:
        """Waiting for what activations send in one micro-batch; a ring is hidden by its layer's computation."""
        forward = self.outer_sent.seconds / 2
        backward = forward
        for each in self.layers:
            ring = max(0.0, each.sent_forward.ring_s - each.seconds.forward / 2)
            ring_back = max(0.0, each.sent_backward.ring_s - each.seconds.backward / 2)
            forward += each.count * (each.sent_forward.seconds + ring)
            backward += each.count * (each.sent_backward.seconds + ring_back)
        return Seconds(forward, backward, 0.0)

    @cached_property
    def weights(self) -> RankWeights:
        """What FSDP or DDP sees of this rank."""
        layers = [WeightedLayer(each.count, each.unit, each.seconds) for each in self.layers]
        return RankWeights(layers, self.outer, self.passes.backward)

    @cached_property
    def trained(self) -> float:
        """Numbers that have gradients, before they are sharded."""
        return self.weights.trained

    @cached_property
    def trained_here(self) -> float:
        """Those that this rank's optimizer updates."""
        return self.weights.trained_shard(self.groups)

    @cached_property
    def exchange(self) -> Exchange:
        """Of weights and gradients over data-parallel ranks, in the step."""
        return exchange_weights(self.weights, self.job, self.layout, self.groups, self.cluster, self.cut.count)

    @cached_property
    def upkeep_s(self) -> float:
        """Once a step or a micro-batch, on the device: the optimizer, casts and sums of gradients."""
        job, count = self.job, self.cut.count
        master, compute = job.master_bytes, job.compute_bytes
        moved = self.exchange.copied
        if self.layout.shards == 1:
            casts = 0 if not job.is_mixed else compute if job.keeps_copies else 2 * (master + compute) * count
            adds_itself = job.copies_itself and self.layout.world_size == 1
            moved += self.trained * (casts + (1 if adds_itself else 3) * master * (count - 1))
        else:
            moved += self.trained * (master + compute) * count
            moved += self.trained_here * 3 * master * (count - 1)
        on_device = self.layout.offload == "none"
        clips_itself = on_device and job.optim == "adamw_torch"
        moved += self.trained_here * (_NORM_NUMBERS + (0.0 if clips_itself else _SCALING_NUMBERS)) * master
        if on_device:
            moved += self.trained_here * OPTIMIZER_NUMBERS.get(job.optim, _ADAMW_NUMBERS) * master
        return stream_seconds(self.cluster.device, moved)

    @cached_property
    def offload_s(self) -> float:
        """What the host's part takes: moving over PCIe, and AdamW in the host's memory, which all GPUs of a node share;
        shards of weights travel beside computing."""
        layout, master = self.layout, self.job.master_bytes
        if layout.offload == "none":
            return 0.0
        share = HOST_MEMORY_BYTES_PER_S / min(self.cluster.per_node, layout.world_size)
        adam = self.trained_here * _ADAMW_NUMBERS * master / share
        if layout.offload == "optimizer":
            return 2 * self.trained_here * master / HOST_LINK_BYTES_PER_S + adam
        weights = self.outer.gathered + sum(each.count * each.unit.gathered for each in self.layers)
        stored = (
            weights
            / self.job.compute_bytes
            / layout.shards
            * (master if self.job.tuning == "full" else self.job.compute_bytes)
        )
        moved = (2 * stored + self.trained_here * master) / HOST_LINK_BYTES_PER_S
        return self.cut.count * max(0.0, moved - self.passes.forward - self.passes.backward) + adam

    @cached_property
    def hops_s(self) -> float:
        """Handing hidden states from stage to stage. 1f1b waits for its neighbours in each micro-batch, the other
        schedules send beside computing and wait while the pipeline fills and empties."""
        if self.layout.pp == 1:
            return 0.0
        hop = self.groups.pp.hop_seconds(self.cluster, self.hop_bytes)
        waits = 2 * (num_stages(self.layout) - 1)
        return hop * (waits + 2 * self.cut.count * (self.layout.pp_schedule == "1f1b"))

    @property
    def hop_bytes(self) -> float:
        """Hidden states of one micro-batch, whole on each tp rank."""
        return self.tokens * self.shape.hidden * self.job.compute_bytes

    @cached_property
    def compute_s(self) -> float:
        """Of the step, with what computation beside communication loses."""
        return (
            self.cut.count * (self.passes.forward + self.passes.backward)
            + self.upkeep_s
            + OVERLAP_COST * self.exchange.crowding_s
        )

    @cached_property
    def exposed_s(self) -> float:
        """Of the step, waiting for links."""
        waits = self.cut.count * max(self.waits.forward + self.waits.backward - self.behind_s, 0.0)
        return waits + self.exchange.exposed_s + self.hops_s + self.offload_s

    @cached_property
    def behind_s(self) -> float:
        """Of what one micro-batch waits for links, what it waits for the host anyway. The host gives the device what
        follows while ranks exchange; where they exchange experts it waits for their counts, layer by layer. Layers that
        run as they are were timed, and fitted, by an engine that waited for the device now and then."""
        if self.layout.ep > 1 or self.engine.name == "eager":
            return 0.0
        waits = self.waits.forward + self.waits.backward
        computed = sum(each.count * each.seconds.device for each in self.layers)
        given = sum(each.count * each.seconds.host for each in self.layers)
        paced = sum(each.count * (each.seconds.forward + each.seconds.backward) for each in self.layers)
        return paced + waits - max(computed + waits, given)

    @cached_property
    def idle_s(self) -> float:
        """Of the step, the pipeline's bubble."""
        passes, waits = self.passes, self.waits
        input_grad = passes.backward - passes.weight_grad + waits.backward
        return bubble_seconds(self.layout, passes.forward + waits.forward, input_grad, passes.weight_grad)

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.exposed_s + self.idle_s

    def bytes_sent(self) -> dict[str, float]:
        """By axis, in a step; axes that send nothing are left out."""
        count = self.cut.count
        found = defaultdict[str, float](float, self.exchange.sent)
        found["tp"] += count * self.outer_sent.tp_bytes
        for each in self.layers:
            for sent in (each.sent_forward, each.sent_backward):
                found["tp"] += count * each.count * sent.tp_bytes
                found["cp"] += count * each.count * sent.cp_bytes
                found["ep"] += count * each.count * sent.ep_bytes
        found["pp"] += count * pipeline_sends(self.layout) * self.hop_bytes
        return {axis: total for axis, total in found.items() if total}


def estimate_cost(
    shape: ModelShape,
    job: Job,
    layout: Layout,
    cluster: Cluster,
    recompute: Recompute,
    micro_batch: int,
    engine: Engine | None = None,
) -> Cost:
    """Time of one optimizer step of a job under a layout that fits the model (`axes.check_layout`).

    Args:
        recompute: what the backward pass computes again.
        micro_batch: positions of a micro-batch on one data-parallel rank.
        engine: what runs the layers; None for the job's own.
    Raises:
        PlanError: the device lacks the compute dtype.
    """
    cut, groups = cut_step(job, layout, micro_batch), groups_of(layout)
    engine = engine_in(layout, ENGINES[job.engine] if engine is None else engine)
    pipeline = Layout(pp=layout.pp, pp_schedule=layout.pp_schedule, pp_layers=layout.pp_layers)
    ranks = (
        _Rank(shape, job, layout, cluster, recompute, cut, engine, groups, load)
        for load in rank_loads(shape.order, job, pipeline)
    )
    busiest = max(ranks, key=lambda rank: rank.step_s)
    step_s = busiest.step_s
    tokens_per_s = job.tokens_per_step / step_s
    peak = cluster.device.peak(job.compute) * layout.world_size
    return Cost(
        compute_s=busiest.compute_s,
        exposed_s=busiest.exposed_s,
        bubble=bubble_share(busiest.idle_s, busiest.compute_s + busiest.exposed_s),
        step_s=step_s,
        tokens_per_s=tokens_per_s,
        mfu=model_flops(shape, job) * tokens_per_s / peak,
        bytes_sent=busiest.bytes_sent(),
    )
