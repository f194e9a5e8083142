"""Bytes that a rank holds between steps: weights, scales of packed weights, gradients, optimizer state.

Exact: the same arithmetic as the engine's own cuts (parallel/tensor.py, expert.py, stages.py, and FSDP's even rows).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from fourfold.families.one_input import OF_ONE_INPUT, columns_of_rank
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape, Weight
from fourfold.planning.stages import stage_layers, stages_of_rank

BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4-bit types, and scales that share one under double quantisation."""

_MOMENT_BYTES = {
    "adamw_torch": (2, None),
    "adamw_8bit": (2, 1),
    "sgd": (0, None),
    "adafactor": (0, None),
    "muon": (1, None),
}
"""Optimizer -> moments of a trained number, and bytes of each (None: as the masters)."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank holds of something, in numbers and bytes.

    Attributes:
        weights: bytes of parameters, sharded as they are between steps.
        scales: bytes of packed weights' constants.
        trained: numbers that are trained, as this rank holds them.
        whole: bytes of the parameters when FSDP has gathered them, in the dtype of the computation.
        whole_trained: numbers that are trained, gathered.
        cast: numbers of trained matrices that autocast copies to the compute dtype.
    """

    weights: int = 0
    scales: int = 0
    trained: int = 0
    whole: int = 0
    whole_trained: int = 0
    cast: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(
            self.weights + other.weights,
            self.scales + other.scales,
            self.trained + other.trained,
            self.whole + other.whole,
            self.whole_trained + other.whole_trained,
            self.cast + other.cast,
        )

    def times(self, count: int) -> Part:
        """So many of it."""
        return Part(
            count * self.weights,
            count * self.scales,
            count * self.trained,
            count * self.whole,
            count * self.whole_trained,
            count * self.cast,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rank of the pipeline runs: layers by kind, and whether it embeds and ends.

    Attributes:
        counts: for each of its stages, how many layers of each kind of the shape.
        trained: for each of its stages, how many layers of each kind are trained in full.
    """

    counts: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]
    is_first: bool
    is_last: bool

    def layers(self) -> tuple[int, ...]:
        """Layers of each kind over all its stages."""
        return tuple(map(sum, zip(*self.counts, strict=True)))

    def trained_layers(self) -> tuple[int, ...]:
        """Of these, those that are trained in full."""
        return tuple(map(sum, zip(*self.trained, strict=True)))


def stage_of(shape: ModelShape, job: Job, layout: Layout, pp_rank: int) -> Stage:
    """What a rank of the pipeline runs; everything where there is none."""
    trained = {"lora": 0, "freeze": job.trained_layers, "full": shape.num_layers}[job.tuning]
    pipeline = Layout(pp=layout.pp, pp_schedule=layout.pp_schedule, pp_layers=layout.pp_layers)
    return _stage_of(shape, trained, pipeline, pp_rank)


@lru_cache(maxsize=4096)
def _stage_of(shape: ModelShape, trained_layers: int, layout: Layout, pp_rank: int) -> Stage:
    """The same of a layout that is nothing but a pipeline, so that many layouts share it.

    Args:
        trained_layers: the last ones, which are trained in full.
    """
    spans = stage_layers(layout, shape.num_layers) if layout.pp > 1 else [range(shape.num_layers)]
    numbers = stages_of_rank(layout, pp_rank) if layout.pp > 1 else (0,)
    first, kinds = shape.num_layers - trained_layers, range(len(shape.kinds))
    counts = [tuple(sum(shape.order[i] == kind for i in spans[n]) for kind in kinds) for n in numbers]
    trained = [tuple(sum(shape.order[i] == kind for i in spans[n] if i >= first) for kind in kinds) for n in numbers]
    return Stage(tuple(counts), tuple(trained), 0 in numbers, len(spans) - 1 in numbers)


@lru_cache(maxsize=4096)
def layer_part(shape: ModelShape, job: Job, layout: Layout, kind: int, *, trained: bool) -> Part:
    """One layer of a rank, adapters included.

    Args:
        layout: `Layout.of_a_layer` is enough, and many layouts have the same.
        kind: of the layer, as `ModelShape.order` has it.
        trained: whether its own weights are.
    """
    weights = shape.kinds[kind].weights
    return _sum(_weight_part(shape, job, layout, weight, trained=trained) for weight in weights)


@lru_cache(maxsize=4096)
def outer_part(shape: ModelShape, job: Job, layout: Layout, *, is_first: bool, is_last: bool) -> Part:
    """Embedding, last norm and head, as far as the first stage, or the last one, has them.

    Args:
        layout: `Layout.of_a_layer` is enough, and many layouts have the same.
        is_first, is_last: the stages that a rank has.
    """
    found: list[Weight] = []
    on_host = job.host_embedding and job.tuning != "full" and not shape.tied and not layout.splits_model
    for weight in shape.outer:
        if weight.kind == "embedding" and on_host:
            continue
        on_last = weight.kind in ("head", "norm", "other") or (shape.tied and weight.kind == "embedding")
        if (is_first and weight.kind == "embedding") or (is_last and on_last):
            found.append(weight)
    part = _sum(_weight_part(shape, job, layout, weight, trained=job.tuning == "full") for weight in found)
    if shape.tied and is_last and job.tuning == "full" and job.is_mixed and layout.shards == 1:
        table = shape.vocab * shape.hidden // layout.tp  # as the head it is an operand of a product
        part = replace(part, cast=part.cast + table)
    return part


def optimizer_bytes(job: Job, trained: int) -> int:
    """State of so many trained numbers."""
    moments, size = _MOMENT_BYTES.get(job.optim, (2, None))
    return int(trained * moments * (job.master_bytes if size is None else size))


def cut_numel(shape: ModelShape, layout: Layout, weight: Weight) -> tuple[int, int]:
    """Rows and row length of a rank's part of a weight, before FSDP cuts rows: [rows, rest]."""
    sizes = list(weight.shape)
    if weight.kind == "experts" and layout.ep > 1:
        sizes[0] //= layout.ep
    if weight.cut is not None and layout.tp > 1:
        parts = min(layout.tp, shape.kv_heads) if weight.of_kv else layout.tp
        sizes[weight.cut] = -(-sizes[weight.cut] // parts)
    rest = 1
    for size in sizes[1:]:
        rest *= size
    return sizes[0], rest


def _weight_part(shape: ModelShape, job: Job, layout: Layout, weight: Weight, *, trained: bool) -> Part:
    rows, rest = cut_numel(shape, layout, weight)
    numel = rows * rest
    shards = layout.shards // layout.ep if weight.kind == "experts" and layout.ep > 1 else layout.shards
    packed = job.bits is not None and weight.linear
    if packed:
        size = numel // 2 if job.bits == 4 else numel
        part = Part(-(-size // shards), _scale_bytes(job, layout, numel, rows), 0, size if shards > 1 else 0, 0)
    else:
        held = -(-rows // shards) * rest
        each = job.master_bytes if trained else job.compute_bytes
        whole = numel * job.compute_bytes if shards > 1 else 0
        # autocast copies operands of products; FSDP's own mixed precision gathers in the compute dtype, and layers
        # that multiply in float8 or are compiled cast for themselves
        casts_itself = (job.float8 or job.engine != "eager") and weight.linear
        copied = trained and weight.is_matrix and not casts_itself
        cast = numel if copied and job.is_mixed and layout.shards == 1 else 0
        kept = held * job.compute_bytes if trained and weight.linear and job.keeps_copies else 0
        part = Part(held * each + kept, 0, held if trained else 0, whole, numel if trained else 0, cast)
    return part + _adapter_part(shape, job, layout, weight, shards)


def _scale_bytes(job: Job, layout: Layout, numel: int, rows: int) -> int:
    """Constants of a packed weight, which FSDP does not shard."""
    if job.bits == 8:
        return 4 * rows
    scales = -(-numel // BLOCK)
    if job.double_quant and layout.tp == 1:
        return scales + 4 * -(-scales // OUTER_BLOCK)
    return 4 * scales


def gets_adapter(job: Job, weight: Weight) -> bool:
    """Whether a weight gets a low-rank adapter."""
    if job.tuning != "lora" or not (weight.linear or (weight.kind == "experts" and len(weight.shape) == 3)):
        return False
    name = weight.name.removesuffix(".weight")
    return "all" in job.lora_targets or any(name == t or name.endswith(f".{t}") for t in job.lora_targets)


def _adapter_part(shape: ModelShape, job: Job, layout: Layout, weight: Weight, shards: int) -> Part:
    """A [r, in] and B [out, r]; of stacked experts each has its own."""
    if not gets_adapter(job, weight):
        return Part()
    copies = weight.shape[0] // layout.ep if len(weight.shape) == 3 else 1
    outer, inner = weight.shape[-2], weight.shape[-1]
    if layout.tp > 1 and weight.cut is not None:
        parts = min(layout.tp, shape.kv_heads) if weight.of_kv else layout.tp
        if weight.cut == len(weight.shape) - 2:
            outer = -(-outer // parts)
        elif weight.cut == len(weight.shape) - 1:
            inner = -(-inner // parts)
    held = whole = 0
    for rows, rest in ((job.lora_rank * copies, inner), (outer, job.lora_rank * copies)):
        held += -(-rows // shards) * rest
        whole += rows * rest
    gathered = whole * job.compute_bytes if shards > 1 else 0
    return Part(held * job.master_bytes + _room_beside(shape, job, layout, weight), 0, held, gathered, whole)


def _room_beside(shape: ModelShape, job: Job, layout: Layout, weight: Weight) -> int:
    """Bytes of the columns and rows beside a frozen weight for low-rank terms (models/wide_rank.py)."""
    if job.engine == "eager" or job.bits is not None or layout.shards > 1 or len(weight.shape) != 2:
        return 0
    name = weight.name.removesuffix(".weight").rpartition(".")[2]
    group = next((group for group in OF_ONE_INPUT if name in group), (name,))
    if "all" not in job.lora_targets and not set(group) <= set(job.lora_targets):
        group = (name,)
    rows, columns = cut_numel(shape, layout, weight)
    more = columns_of_rank(len(group) * job.lora_rank)
    below = more * (columns + more) if name == group[0] else 0  # rows are for a group together
    return (rows * more + below) * job.compute_bytes


def _sum(parts: Iterable[Part]) -> Part:
    total = Part()
    for part in parts:
        total = total + part
    return total


def held_part(shape: ModelShape, job: Job, layout: Layout, pp_rank: int) -> Part:
    """Everything that a rank of the pipeline holds."""
    stage, seen = stage_of(shape, job, layout, pp_rank), layout.of_a_layer()
    parts = [outer_part(shape, job, seen, is_first=stage.is_first, is_last=stage.is_last)]
    for kind, (total, trained) in enumerate(zip(stage.layers(), stage.trained_layers(), strict=True)):
        parts.append(layer_part(shape, job, seen, kind, trained=True).times(trained))
        parts.append(layer_part(shape, job, seen, kind, trained=False).times(total - trained))
    return _sum(parts)
