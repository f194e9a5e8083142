"""Why a layout is what it is, in one line with the job's own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fourfold.base.units import GIB
from fourfold.planning.candidates import name_of
from fourfold.planning.estimate import Estimate, Memory
from fourfold.planning.hardware import Cluster
from fourfold.planning.held import held_by
from fourfold.planning.job import Job
from fourfold.planning.shape import ModelShape


def reason_of(
    found: Estimate,
    shape: ModelShape,
    job: Job,
    cluster: Cluster,
    whole: Memory,
    kept: Memory,
    without: Mapping[str, Estimate | None],
) -> str:
    """One line: what fits where, what each axis is for, and what memory costs in work.

    Args:
        whole: memory of the leanest form on one GPU.
        kept: memory of the same form if nothing were computed again.
        without: axis (`shards` for dp_shard) -> what is best without it, None if nothing fits then.
    """
    parts = list(_parts(found, shape, job, cluster, whole, without))
    if found.recompute != "none":
        need = f"{kept.device / GIB:.1f} GiB with everything kept"
        spared = found.keeps.spared
        which = f" of {shape.num_layers - spared} of {shape.num_layers} layers" if spared else ""
        parts.append(f"recompute {found.recompute}{which}, since it would take {need}")
    more = {"logits": found.keeps.logits, "copies of weights in 16 bits": found.keeps.copies}
    if any(more.values()):
        parts.append(f"{' and '.join(what for what, is_kept in more.items() if is_kept)} are kept, since there is room")
    return "; ".join(parts)


def instead(found: Estimate, axis: str, without: Mapping[str, Estimate | None]) -> str | None:
    """What a layout gains by an axis: that it fits, or what is fastest without; None if that was not looked for."""
    if axis not in without:
        return None
    other = without[axis]
    if other is None:
        return "without it nothing fits"
    again = "" if other.recompute == found.recompute else f", recompute {other.recompute}"
    return f"without it {compared(other, found)}: {name_of(other.layout)}{again}"


def compared(other: Estimate, first: Estimate) -> str:
    """How fast a layout is beside another one."""
    share = other.cost.tokens_per_s / first.cost.tokens_per_s
    if share >= 1.005:
        return f"{share:.0%} as fast if all goes well"
    return "as fast" if share >= 0.995 else f"{share:.0%} as fast"


def _parts(
    found: Estimate,
    shape: ModelShape,
    job: Job,
    cluster: Cluster,
    whole: Memory,
    without: Mapping[str, Estimate | None],
) -> Iterator[str]:
    layout, room = found.layout, cluster.device.memory_gib
    fits = whole.device <= cluster.device.memory_bytes
    need = f"{whole.device / GIB:.1f} of {room:.1f} GiB"
    if layout.world_size == 1:
        yield f"all on one GPU, {found.memory.device / GIB:.1f} of {room:.1f} GiB"
    elif not layout.splits_model:
        yield f"the whole fits one GPU ({need} at least), so replicas send only gradients"
    elif not fits:
        yield f"the whole needs {whole.device / GIB:.1f} GiB and a GPU has {room:.1f}"
    else:
        yield f"the whole fits one GPU ({need} at least), but is faster when shared"
    if found.keeps.unpacked:
        yield "4-bit weights are unpacked once and kept, since there is room (memory: low leaves them packed)"
    told: set[str | None] = {None}
    for axis, what in _axes(found, shape, job, cluster):
        other = instead(found, axis, without)
        yield what if other in told else f"{what} ({other})"
        told.add(other)


def _axes(found: Estimate, shape: ModelShape, job: Job, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Each axis in use, and what it does."""
    layout = found.layout
    if layout.shards > 1:
        yield "shards", _sharded(found, shape, job)
    if layout.dp_replicate > 1 and layout.splits_model:
        yield "dp_replicate", f"{layout.dp_replicate} replicas, which meet once a step"
    if layout.tp > 1:
        where = "the fast link" if cluster.device.link.kind != "pcie" else "PCIe"
        yield "tp", f"tp {layout.tp} cuts every matrix and what lies between, within {where}"
    if layout.cp > 1:
        yield "cp", f"cp {layout.cp} shares the {job.sequence:,} positions of a sequence"
    if layout.ep > 1:
        yield (
            "ep",
            f"ep {layout.ep}: a rank has {shape.experts // layout.ep} of {shape.experts} experts, and tokens travel",
        )
    if layout.pp > 1:
        yield "pp", f"pp {layout.pp} sends only activations, and idles {found.cost.bubble:.0%} of a step"


def _sharded(found: Estimate, shape: ModelShape, job: Job) -> str:
    layout = found.layout
    state = held_by(shape, job, layout, found.memory.rank).total / GIB
    stage = "" if layout.pp > 1 or layout.zero == 3 else f" (zero {layout.zero})"
    return f"{layout.shards} shards{stage} leave {state:.1f} GiB of state on each"
