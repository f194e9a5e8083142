"""What the layers of a rank hold, keep and work with, summed; where a pipeline gives it two stages, also for each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fourfold.planning.activations import Kept, kept
from fourfold.planning.flops import layer_products, weight_groups
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.states import Part, Stage, layer_part

_STAYS = 0.7
"""Of a layer that is computed again for the gradients of one group of its weights, what stays until all groups of the
stage have theirs; the rest is used up. Traced (`Rehearsal`, --fake): 0.66 to 0.75 of a Llama-3-8B layer, 14 groups
under LoRA and 9 in full, one to five layers a stage."""


@dataclass(frozen=True, slots=True)
class StageSums:
    """Sums over the layers of one stage.

    Attributes:
        layers: how many.
        kept: bytes a position of all layers, under the recompute that was asked for.
        split: the same, of gradients that wait for those of the weights, where a backward pass has two parts.
        replayed: the same, of layers that are computed again for the weights' gradients, once for each group of them.
        cast: as `Part` has it.
    """

    layers: int = 0
    kept: float = 0.0
    split: float = 0.0
    replayed: float = 0.0
    cast: int = 0


@dataclass(frozen=True, slots=True)
class LayerSums:
    """Sums over the layers of a rank.

    Attributes:
        part: what is held of them.
        stages: of each stage.
        replayed: bytes a position that a layer keeps while it is computed again.
        working: bytes a position that a layer's backward pass needs besides.
        largest: of FSDP's units.
        entry: bytes a position of one layer's kept input.
        spared: of the layers of which nothing is computed again where others are; `kept` is what that is more.
    """

    part: Part
    stages: tuple[StageSums, ...]
    replayed: float
    working: float
    largest: Part
    entry: float
    spared: StageSums = StageSums()


def sum_layers(shape: ModelShape, job: Job, layout: Layout, stage: Stage, recompute: Recompute) -> LayerSums:
    """The sums over the layers of a rank.

    Args:
        stage: what it runs.
    """
    if layout.splits_backward and recompute == "selective":
        recompute = "full"  # as the engine does it (training/build.py)
    part, largest = Part(), Part()
    replayed = working = entry = 0.0
    seen, free = layout.of_a_layer(), spared_kinds(shape, job, layout, recompute)
    spared = StageSums()
    stages: list[StageSums] = []
    for counts, trained_counts in zip(stage.counts, stage.trained, strict=True):
        layers, kept_bytes, split, again, cast = 0, 0.0, 0.0, 0.0, 0
        for kind, (layer, total, full_count) in enumerate(zip(shape.kinds, counts, trained_counts, strict=True)):
            for trained, number in ((True, full_count), (False, total - full_count)):
                if not number:
                    continue
                one = layer_part(shape, job, seen, kind, trained=trained)
                part = part + one.times(number)
                layers += number
                cast += number * one.cast
                found: Kept = kept(shape, job, seen, kind, trained=trained)
                if trained or job.tuning == "lora":
                    whole = found.none if job.engine == "eager" else found.compiled
                    own = found.of(recompute) if job.engine == "eager" or recompute == "full" else whole
                    few = min(free[kind], number)
                    more = few * (whole - own)
                    spared = StageSums(
                        spared.layers + few,
                        spared.kept + more,
                        cast=spared.cast + few * one.cast,
                    )
                    kept_bytes += number * own + more
                    replayed = max(replayed, whole - own)
                    working = max(working, found.working)
                    entry = max(entry, own)
                    if layout.splits_backward:
                        split += number * _split(shape, kind, job, layout, trained=trained)
                        groups = weight_groups(layer, job, "trained" if trained else "adapted")
                        again += number * groups * _STAYS * (found.none if recompute == "full" else 0.0)
                if one.weights >= largest.weights:
                    largest = one
        stages.append(StageSums(layers, kept_bytes, split, again, cast))
    return LayerSums(part, tuple(stages), replayed, working, largest, entry, spared)


def spared_kinds(shape: ModelShape, job: Job, layout: Layout, recompute: Recompute) -> Counter[int]:
    """Of each kind of layer, how many are not computed again where others are."""
    if not job.spared or recompute == "none" or layout.pp > 1:
        return Counter()
    return Counter(shape.order[-job.spared :])


def _split(shape: ModelShape, kind: int, job: Job, layout: Layout, *, trained: bool) -> float:
    """What PyTorch keeps between the two parts of a layer's backward pass, bytes a position: the gradient of the result
    of every product with a trained weight, and of norms with one. An adapter has two products."""
    c = job.compute_bytes
    products = layer_products(shape, kind, job, layout.tp, layout.ep)
    if not trained:
        return c * sum(each.rows_of_token * (each.rows + each.adapter) for each in products if each.adapter)
    norms = [
        weight for weight in shape.kinds[kind].weights if weight.kind == "norm" and weight.shape == (shape.hidden,)
    ]
    shared = layout.tp if layout.sequence_parallel else 1
    results = c * sum(each.rows_of_token * each.rows for each in products)
    return results + len(norms) * shape.hidden / shared * job.master_bytes
