"""parallelize(): the only place where a model is split, top to bottom in the only order that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fourfold.base.log import get_logger
from fourfold.parallel.fsdp import shard
from fourfold.parallel.gradients import DdpSync, FsdpSync, GradientSync, NoSync, replicate
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.reduce import Reducer

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parallelized:
    """A model split over a mesh.

    Attributes:
        runner: what is called for a forward pass: the model itself, or its wrapper.
        sync: steers the exchange of gradients.
        reducer: adds up losses and counts over ranks.
        autocast: the context of a forward pass, where the split casts by itself; None leaves it to the caller.
    """

    runner: nn.Module
    sync: GradientSync
    reducer: Reducer
    autocast: Callable[[], AbstractContextManager[object]] | None = None


def parallelize(
    root: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, *, compute: torch.dtype | None
) -> Parallelized:
    """Split a model, in place.

    Args:
        root: the module whose forward pass is called.
        blocks: its decoder layers.
        compute: dtype of the computation where it differs from that of the parameters (mixed precision by FSDP).
    """
    layout = mesh.layout
    if mesh.device_mesh is None:
        return Parallelized(root, NoSync(), Reducer())
    reducer = Reducer(mesh.group(("dp_replicate", "dp_shard")), torch.distributed.group.WORLD)
    if layout.dp_shard > 1:
        axes = ("dp_replicate", "dp_shard") if layout.dp_replicate > 1 else ("dp_shard",)
        sharded = shard(root, blocks, mesh.view(axes), zero=layout.zero, compute=compute)
        log.info("Sharded by FSDP over %s, ZeRO stage %d", " x ".join(axes), layout.zero)
        return Parallelized(root, FsdpSync(sharded, layout.zero), reducer, nullcontext)
    if layout.dp_replicate > 1:
        wrapped = replicate(root, mesh.group(("dp_replicate",)))
        log.info("Replicated by DDP over %d ranks", layout.dp_replicate)
        return Parallelized(wrapped, DdpSync(wrapped), reducer)
    return Parallelized(root, NoSync(), reducer)
