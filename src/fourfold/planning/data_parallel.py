"""What data-parallel ranks exchange in a step - weights and gradients - and how much of it computation hides.

FSDP gathers a layer while the one before it computes, and scatters its gradients while the next one does; DDP adds up
gradients beside the last backward pass. What is not hidden: where computation is too short, the first gather and the
last scatter (parallel/fsdp.py, parallel/gradients.py). In a pipeline all of it happens once a step, and gradients
travel after the last micro-batch (parallel/pipeline.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fourfold.planning.hardware import Cluster
from fourfold.planning.job import Job
from fourfold.planning.kernels import Seconds
from fourfold.planning.layout import Layout
from fourfold.planning.traffic import CALL_S, Groups, Unit


@dataclass(frozen=True, slots=True)
class WeightedLayer:
    """One kind of layer: how many, what of it is exchanged, and the computation that hides it."""

    count: int
    unit: Unit
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class RankWeights:
    """What one rank of the pipeline has.

    Attributes:
        layers: its layers.
        outer: embedding, last norm and head, as far as they are here.
        backward_s: computation of one micro-batch's backward pass.
    """

    layers: Sequence[WeightedLayer]
    outer: Unit
    backward_s: float

    @property
    def trained(self) -> float:
        """Numbers that have gradients, before they are sharded."""
        return self.outer.trained + sum(each.count * each.unit.trained for each in self.layers)

    def trained_shard(self, groups: Groups) -> float:
        """Those of this rank's shards."""
        experts = sum(each.count * each.unit.expert_trained for each in self.layers)
        return (self.trained - experts) / groups.shard.size + experts / groups.experts.size

    @property
    def last_share(self) -> float:
        """Of the gradients, those that are only known when the backward pass ends: of the embedding, or else of the
        first layer."""
        first_layer = 1 / max(sum(each.count for each in self.layers), 1)
        return self.outer.trained / self.trained or first_layer


@dataclass(frozen=True, slots=True)
class Exchange:
    """Of weights and gradients in one step.

    Attributes:
        sent: bytes that a rank sends, by axis.
        exposed_s: time that is waited for.
        crowding_s: of the time beside computation, what the device's own link would take for as many bytes.
        copied: bytes that gathers read and write on the device.
    """

    sent: dict[str, float] = field(hash=False, default_factory=dict)
    exposed_s: float = 0.0
    crowding_s: float = 0.0
    copied: float = 0.0


@dataclass(frozen=True, slots=True)
class _Times:
    """How often a step gathers weights for forward and for backward passes, and scatters gradients."""

    gathers: int
    gathers_back: int
    scatters: int

    @classmethod
    def of(cls, layout: Layout, count: int) -> _Times:
        if layout.pp > 1:
            return cls(1, 0, 1)
        gathers = count if layout.zero == 3 else 1
        return cls(gathers, count if layout.reshards else 0, 1 if layout.zero == 1 else count)


@dataclass(frozen=True, slots=True)
class _UnitTraffic:
    """Bytes that a rank sends in one gather and in one scatter of a unit, and their times.

    Attributes:
        crowding: of these times, what the device's own link would take.
    """

    gathered: float
    scattered: float
    gather_s: float
    scatter_s: float
    crowding: float

    @classmethod
    def of(cls, unit: Unit, job: Job, groups: Groups, cluster: Cluster) -> _UnitTraffic:
        shard, experts, master = groups.shard, groups.experts, job.master_bytes
        plain, of_experts = shard.share(unit.gathered - unit.expert_gathered), experts.share(unit.expert_gathered)
        grads = shard.share((unit.trained - unit.expert_trained) * master)
        of_grads = experts.share(unit.expert_trained * master)
        all_s = shard.seconds(cluster, plain + grads)
        experts_s = experts.seconds(cluster, of_experts + of_grads)
        own_s = all_s * shard.crowding(cluster) + experts_s * experts.crowding(cluster)
        return cls(
            plain + of_experts,
            grads + of_grads,
            shard.seconds(cluster, plain) + experts.seconds(cluster, of_experts),
            shard.seconds(cluster, grads) + experts.seconds(cluster, of_grads),
            own_s / (all_s + experts_s) if all_s + experts_s else 0.0,
        )


def exchange_weights(
    weights: RankWeights, job: Job, layout: Layout, groups: Groups, cluster: Cluster, count: int
) -> Exchange:
    """The exchange of one rank.

    Args:
        count: micro-batches of the step.
    """
    if layout.shards > 1:
        sharded = _shard(weights, job, layout, groups, cluster, count)
        replicated = _add_up(weights, weights.trained_shard(groups), job, layout, groups, cluster)
        return Exchange(
            {**sharded.sent, **replicated.sent},
            sharded.exposed_s + replicated.exposed_s,
            sharded.crowding_s + replicated.crowding_s,
            sharded.copied,
        )
    return _add_up(weights, weights.trained, job, layout, groups, cluster)


def _add_up(
    weights: RankWeights, numbers: float, job: Job, layout: Layout, groups: Groups, cluster: Cluster
) -> Exchange:
    """The sum of gradients, or of shards of them, over replicas: once a step, an all-reduce."""
    replicas = groups.replicate
    if replicas.size == 1 or not numbers:
        return Exchange()
    sent = 2 * replicas.share(numbers * job.master_bytes)
    total = replicas.seconds(cluster, sent, 2)
    exposed = total
    if layout.pp == 1:
        last = total * weights.last_share
        exposed = last + max(0.0, total - last - weights.backward_s)
    return Exchange({replicas.axis: sent}, exposed, (total - exposed) * replicas.crowding(cluster))


def _shard(weights: RankWeights, job: Job, layout: Layout, groups: Groups, cluster: Cluster, count: int) -> Exchange:
    """FSDP's gathers and scatters."""
    times = _Times.of(layout, count)
    outer = _UnitTraffic.of(weights.outer, job, groups, cluster)
    sent = times.gathers * outer.gathered + times.scatters * outer.scattered
    # what no layer holds is gathered before the first layer, and its gradients come last
    exposed = times.gathers * outer.gather_s + times.scatters * outer.scatter_s
    hidden, crowding, copied = 0.0, 0.0, 2 * times.gathers * weights.outer.gathered
    exposed += CALL_S * (times.gathers + times.scatters)
    ends = 0.0
    for each in weights.layers:
        unit = _UnitTraffic.of(each.unit, job, groups, cluster)
        gathers = times.gathers + times.gathers_back
        sent += each.count * (gathers * unit.gathered + times.scatters * unit.scattered)
        copied += each.count * 2 * gathers * each.unit.gathered
        total = each.count * (gathers * unit.gather_s + times.scatters * unit.scatter_s)
        late = each.count * _late(unit, times, each.seconds, pipeline=layout.pp > 1)
        exposed += late + CALL_S * each.count * (gathers + times.scatters)
        hidden += total - late
        crowding += (total - late) * unit.crowding
        if each is weights.layers[0]:
            ends = times.gathers * unit.gather_s + (0.0 if layout.pp > 1 else times.scatters * unit.scatter_s)
    ends = min(hidden, ends)
    crowding *= 1 - ends / hidden if hidden else 0.0
    return Exchange({groups.shard.axis: sent}, exposed + ends, crowding, copied)


def _late(unit: _UnitTraffic, times: _Times, seconds: Seconds, *, pipeline: bool) -> float:
    """Of one layer's exchange in a step, what its own computation is too short to hide."""
    late = times.gathers * max(0.0, unit.gather_s - seconds.forward)
    if pipeline:
        return late + times.scatters * unit.scatter_s
    both = min(times.scatters, times.gathers_back)
    late += both * max(0.0, unit.gather_s + unit.scatter_s - seconds.backward)
    late += (times.gathers_back - both) * max(0.0, unit.gather_s - seconds.backward)
    return late + (times.scatters - both) * max(0.0, unit.scatter_s - seconds.backward)
