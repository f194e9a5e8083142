"""What ranks send each other in a step: bytes of each collective, and how long it takes on the link of its group.

Bytes are those that one rank sends. With n ranks in a ring a rank sends (n - 1) / n of the whole in an all-gather and
in a reduce-scatter, twice that in an all-reduce, and as much of its own data in an all-to-all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fourfold.planning.axes import AXES
from fourfold.planning.flops import Mode, layer_products, local_numel, num_regions, weight_groups
from fourfold.planning.hardware import Cluster
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.shape import Layer, ModelShape
from fourfold.planning.stages import num_stages, rank_of_stage

CALL_S = 0.2e-3
"""Of each collective that a computation waits for, the time beside the link: its hooks, streams that wait for each
other, ranks that are not equally quick. From FSDP's units: with it zero3 and ddp take equally long for 1.5B parameters
in full on two H100, as was measured (51,483 and 50,000 to 55,000 tokens/s, docs/lab-notes.md); without, zero3 would be
5 % ahead, since it sums and updates less. Two layouts with tensor parallelism on 4 H100 lack 0.18 and 0.28 ms a
collective without it (benchmarks/results/multi_gpu_4xh100.json)."""
HOST_LINK_BYTES_PER_S = 25e9
"""Between a GPU and its host: PCIe 4.0 x16 with four fifths of its nominal 31.5 GB/s, as in the catalogue."""

_PACKED_BYTES = 0.5
"""Of a 4-bit weight; its scales lie beside the parameter and are whole on each rank."""
_NUMBERS_OF_LOSS = 3
"""That ranks exchange for each position of a shared vocabulary, in fp32 (parallel/vocabulary.py)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that exchange something.

    Attributes:
        axis: under which it is counted.
        size, stride: ranks, and the distance of neighbours among all ranks.
        all_to_all: whether every rank sends to every other.
    """

    axis: str
    size: int
    stride: int
    all_to_all: bool = False

    def share(self, total: float) -> float:
        """What a rank sends of so many bytes in a ring, or in an all-to-all of its own."""
        return total * (self.size - 1) / self.size

    def seconds(self, cluster: Cluster, sent: float, collectives: float = 1.0) -> float:
        """Time of sending so many bytes in so many collectives.

        A ring waits for a hop between each two neighbours, of which only those that leave a domain have the network's
        latency; an all-to-all sends to all at once.
        """
        if self.size == 1 or sent <= 0:
            return 0.0
        link = cluster.link(self.size, self.stride, all_to_all=self.all_to_all)
        hops = self.size - 1
        wait = link.latency_s
        if not self.all_to_all:
            crossing = 0 if cluster.is_local(self.size, self.stride) else self._crossings(cluster)
            wait = crossing * link.latency_s + (hops - crossing) * cluster.device.link.latency_s
        return sent / link.attained_bytes_per_s + collectives * wait

    def waited_seconds(self, cluster: Cluster, sent: float, collectives: float) -> float:
        """The same of collectives beside which nothing is computed."""
        seconds = self.seconds(cluster, sent, collectives)
        return seconds + collectives * CALL_S if seconds else 0.0

    def crowding(self, cluster: Cluster) -> float:
        """Of the time that this group's traffic takes, what it would take over the device's own link: what it takes
        from computation beside it goes by bytes, and those of a network come slowly."""
        link = cluster.link(self.size, self.stride, all_to_all=self.all_to_all)
        return min(1.0, link.attained_bytes_per_s / cluster.device.link.attained_bytes_per_s)

    def hop_seconds(self, cluster: Cluster, sent: float) -> float:
        """Time of handing so many bytes to the neighbour."""
        link = cluster.link(self.size, self.stride)
        return sent / link.attained_bytes_per_s + link.latency_s

    def _crossings(self, cluster: Cluster) -> int:
        return min(self.size - 1, max(1, self.size * self.stride // cluster.domain))


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one layout.

    Attributes:
        shard: that share weights by FSDP. experts: the same for experts, where they are cut.
        replicate: that add up gradients: whole ones, or of shards.
        cp, tp, ep, pp: of these axes.
    """

    shard: Group
    experts: Group
    replicate: Group
    cp: Group
    tp: Group
    ep: Group
    pp: Group


def strides(layout: Layout) -> dict[str, int]:
    """Distance in rank of neighbours on each axis: the last axis of the table varies fastest."""
    found, stride = {}, 1
    for axis in reversed(AXES):
        found[axis.name] = stride
        stride *= layout.sizes()[axis.name]
    return found


def groups_of(layout: Layout) -> Groups:
    """Who exchanges what with whom."""
    stride = strides(layout)
    inner = stride["cp"]
    shard_axis = "dp_shard" if layout.dp_shard > 1 else "cp"
    whole = layout.shards == 1
    replicas = layout.dp_replicate * (layout.cp if whole else 1)
    return Groups(
        shard=Group(shard_axis, layout.shards, inner),
        experts=Group(shard_axis, layout.shards // layout.ep, inner * layout.ep),
        replicate=Group(
            "dp_replicate" if layout.dp_replicate > 1 else "cp", replicas, inner if whole else stride["dp_replicate"]
        ),
        cp=Group("cp", layout.cp, stride["cp"], layout.cp_method == "ulysses"),
        tp=Group("tp", layout.tp, stride["tp"]),
        ep=Group("ep", layout.ep, inner, True),
        pp=Group("pp", layout.pp, stride["pp"]),
    )


@dataclass(frozen=True, slots=True)
class Unit:
    """What FSDP gathers at one time: a layer, or what no layer holds; on one rank, before it is sharded.

    Attributes:
        gathered: bytes of its weights in the dtype in which they are gathered.
        expert_gathered: of it, the experts that other ranks share.
        trained: numbers that have gradients.
        expert_trained: of them, those of experts.
        numel: all numbers.
    """

    gathered: float
    expert_gathered: float
    trained: float
    expert_trained: float
    numel: float


def layer_unit(shape: ModelShape, kind: int, job: Job, mode: Mode, layout: Layout) -> Unit:
    """One layer, with its adapters."""
    gathered = expert_gathered = trained = expert_trained = numel = 0.0
    for weight in shape.kinds[kind].weights:
        local = local_numel(weight, shape, layout)
        packed = job.bits is not None and weight.linear
        size = local * (_PACKED_BYTES if packed else job.compute_bytes)
        numel += local
        gathered += size
        if weight.kind == "experts":
            expert_gathered += size
        if mode == "trained":
            trained += local
            expert_trained += local if weight.kind == "experts" else 0.0
    if mode == "adapted":
        products = layer_products(shape, kind, job, layout.tp, layout.ep)
        trained = sum(product.adapter_numel for product in products)
        expert_trained = sum(product.adapter_numel for product in products if product.groups > 1)
        gathered += trained * job.compute_bytes
        expert_gathered += expert_trained * job.compute_bytes
    return Unit(gathered, expert_gathered, trained, expert_trained, numel)


def outer_unit(shape: ModelShape, job: Job, layout: Layout, *, first: bool, last: bool) -> Unit:
    """Embedding on the first stage; last norm and head on the last one, where a tied head is the embedding."""
    numel = 0.0
    for weight in shape.outer:
        here = first if weight.kind == "embedding" else last
        if here or (weight.kind == "embedding" and shape.tied and last):
            numel += local_numel(weight, shape, layout)
    return Unit(numel * job.compute_bytes, 0.0, numel if job.tuning == "full" else 0.0, 0.0, numel)


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes, collectives and time of what cannot be hidden, or (`hideable_s`) may be behind attention.

    Attributes:
        num_bytes: by axis, what a rank sends for one micro-batch in one layer.
    """

    tp_bytes: float = 0.0
    cp_bytes: float = 0.0
    ep_bytes: float = 0.0
    seconds: float = 0.0
    ring_s: float = 0.0


def layer_sent(
    shape: ModelShape,
    layer: Layer,
    job: Job,
    layout: Layout,
    groups: Groups,
    cluster: Cluster,
    tokens: float,
    mode: Mode,
    recompute: Recompute,
) -> tuple[Sent, Sent]:
    """What a layer's activations send, forward and backward with what is computed again.

    Args:
        tokens: positions of a micro-batch on a rank.
    """
    forward = _region_sent(shape, layer, job, layout, groups, cluster, tokens, backward=False)
    if mode == "frozen":
        return forward, Sent()
    back = _region_sent(shape, layer, job, layout, groups, cluster, tokens, backward=True)
    times = 0
    if recompute != "none":
        times = 1 + weight_groups(layer, job, mode) if layout.splits_backward else 1
    return forward, Sent(*(getattr(back, name) + times * getattr(forward, name) for name in Sent.__slots__))


def _region_sent(
    shape: ModelShape,
    layer: Layer,
    job: Job,
    layout: Layout,
    groups: Groups,
    cluster: Cluster,
    tokens: float,
    *,
    backward: bool,
) -> Sent:
    """The exchanges of one pass through a layer.

    tp: each region (a part with matrices: attention, MLP) gathers its input and scatters its output, or adds it up; as
    much backward, the other way round; and what some matrices make is put together within a region. ep: tokens to
    their experts and results back, gradients likewise.
    """
    activations = tokens * shape.hidden * job.compute_bytes
    regions = num_regions(layer)
    together = [weight.shape[0] for weight in layer.weights if weight.gathered]
    tp_bytes = 2 * regions * groups.tp.share(activations)
    tp_bytes += groups.tp.share(tokens * sum(together) * job.compute_bytes)
    tp_calls = (2 * regions if layout.sequence_parallel else regions) + len(together)
    seconds = groups.tp.waited_seconds(cluster, tp_bytes, tp_calls)
    heads = layer.split_by("attention", layout.tp)
    cp_bytes, calls = _context_sent(shape, job, layout, groups, tokens, heads, backward=backward)
    ring = layout.cp_method == "ring"
    cp_s = groups.cp.seconds(cluster, cp_bytes, calls) if ring else groups.cp.waited_seconds(cluster, cp_bytes, calls)
    ep_bytes = 2 * groups.ep.share(activations * shape.experts_per_token) if layer.has_experts else 0.0
    seconds += groups.ep.waited_seconds(cluster, ep_bytes, 2)
    return Sent(tp_bytes, cp_bytes, ep_bytes, seconds + (0.0 if ring else cp_s), cp_s if ring else 0.0)


def _context_sent(
    shape: ModelShape, job: Job, layout: Layout, groups: Groups, tokens: float, ranks: int, *, backward: bool
) -> tuple[float, int]:
    """Bytes and collectives of attention over shared positions (parallel/context.py, parallel/ring.py).

    Args:
        ranks: that share the heads.
    """
    size = layout.cp
    if size == 1:
        return 0.0, 0
    dims = shape.head_dim + shape.value_dim
    keys = tokens * max(shape.kv_heads / ranks, 1.0) * dims
    if layout.cp_method == "allgather":
        return (size - 1) * keys * job.compute_bytes, 2
    if layout.cp_method == "ring":
        # backward: keys and values once more, and their gradients in fp32, which come home with one more step
        return keys * ((size - 1) * job.compute_bytes + (size * 4 if backward else 0)), 2 if backward else 1
    queries = tokens * shape.heads / ranks * dims  # and the output, which is as wide as the values
    kv_heads = max(shape.kv_heads // ranks, 1)
    copies = math.lcm(kv_heads, size) // kv_heads  # so that each rank has some
    return groups.cp.share((queries + keys * copies) * job.compute_bytes), 4


def outer_sent(
    shape: ModelShape,
    job: Job,
    layout: Layout,
    groups: Groups,
    cluster: Cluster,
    tokens: float,
    *,
    stages: int,
    first: bool,
    last: bool,
) -> Sent:
    """What tensor-parallel ranks exchange outside layers in both directions: embeddings are added up, positions divided
    and joined at both ends of a stage; before the head gradients are added up, behind it what makes the loss.
    """
    if layout.tp == 1:
        return Sent()
    activations = groups.tp.share(tokens * shape.hidden * job.compute_bytes)
    trained = activations * job.trained_share
    sent = 2.0 * activations if first else 0.0
    if layout.sequence_parallel:
        sent += 2 * stages * activations
    if last:
        of_loss = _NUMBERS_OF_LOSS * 4 * 2 if layout.loss_parallel else shape.vocab * job.compute_bytes
        sent += 2 * trained + groups.tp.share(tokens * job.trained_share * of_loss)
    return Sent(tp_bytes=sent, seconds=groups.tp.waited_seconds(cluster, sent, 2 * stages + 4))


def pipeline_sends(layout: Layout) -> int:
    """Times that the busiest rank sends hidden states, or their gradients, for one micro-batch."""
    if layout.pp == 1:
        return 0
    stages, sends = num_stages(layout), [0] * layout.pp
    for stage in range(stages - 1):
        here, there = rank_of_stage(layout, stage), rank_of_stage(layout, stage + 1)
        if here != there:
            sends[here] += 1
            sends[there] += 1
    return max(sends)
