"""Why a layout is what it is, in one line with the job's own numbers."""

from __future__ import annotations

from collections.abc import Iterator

from fourfold.base.units import GIB
from fourfold.planning.estimate import Estimate, Memory
from fourfold.planning.hardware import Cluster
from fourfold.planning.held import held_by
from fourfold.planning.job import Job
from fourfold.planning.shape import ModelShape


def reason_of(found: Estimate, shape: ModelShape, job: Job, cluster: Cluster, whole: Memory, kept: Memory) -> str:
    """One line: what fits where, what each axis is for, and what memory costs in work.

    Args:
        whole: memory of the leanest form on one GPU.
        kept: memory of the same form if nothing were computed again.
    """
    parts = list(_parts(found, shape, job, cluster, whole))
    if found.recompute != "none":
        need = f"{kept.device / GIB:.1f} GiB with everything kept"
        parts.append(f"recompute {found.recompute}, since it would take {need}")
    return "; ".join(parts)


def _parts(found: Estimate, shape: ModelShape, job: Job, cluster: Cluster, whole: Memory) -> Iterator[str]:
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
        yield f"the whole fits one GPU ({need} at least), and sharing leaves room to work faster"
    if layout.shards > 1:
        yield _sharded(found, shape, job)
    if layout.dp_replicate > 1 and layout.splits_model:
        yield f"{layout.dp_replicate} replicas, which meet once a step"
    if layout.tp > 1:
        where = "the fast link" if cluster.device.link.kind != "pcie" else "PCIe"
        yield f"tp {layout.tp} cuts every matrix, within {where}"
    if layout.cp > 1:
        yield f"cp {layout.cp} shares the {job.sequence:,} positions of a sequence"
    if layout.ep > 1:
        yield f"ep {layout.ep}: a rank has {shape.experts // layout.ep} of {shape.experts} experts, and tokens travel"
    if layout.pp > 1:
        yield f"pp {layout.pp} sends only activations, and idles {found.cost.bubble:.0%} of a step"


def _sharded(found: Estimate, shape: ModelShape, job: Job) -> str:
    layout = found.layout
    state = held_by(shape, job, layout, found.memory.rank).total / GIB
    stage = "" if layout.pp > 1 or layout.zero == 3 else f" (zero {layout.zero})"
    return f"{layout.shards} shards{stage} leave {state:.1f} GiB of state on each"
