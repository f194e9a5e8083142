"""Fully sharded data parallelism (ZeRO stages 1 to 3, with or without replicas) by PyTorch's FSDP2.

A layer is the unit: its weights are gathered whole for its forward and backward pass, so the largest layer with its
gradient must fit a device, not the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from fourfold.parallel.packed import store_packed_as


def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    reshard: bool,
    compute: torch.dtype | None,
    on_host: bool = False,
    apart: Sequence[nn.Module] = (),
    apart_mesh: DeviceMesh | None = None,
) -> FSDPModule:
    """Shard a model's parameters, in place, over a mesh.

    Args:
        root: the module whose forward pass is called; what no block holds (embedding, last norm, head) is its own unit.
        blocks: the decoder layers.
        mesh: [dp_shard] or [dp_replicate, dp_shard].
        reshard: free gathered weights after each forward pass.
        compute: dtype of gathered weights and of the computation; None for that of the parameters.
        on_host: keep the shards, their gradients and so the optimizer's work on the host.
        apart: modules of the blocks that fewer ranks hold alike (a part of the experts), which are their own units.
        apart_mesh: those ranks, [dp_shard] or [dp_replicate, dp_shard].
    """
    store_packed_as(root, compute or torch.float32)
    # pinned where a GPU reads it; without one there is nothing to pin for
    host: OffloadPolicy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if on_host else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    for module in apart:
        # Their inputs stay as the layer made them: routers may weight in fp32.
        uncast = replace(policy, cast_forward_inputs=False)
        fully_shard(module, mesh=apart_mesh, reshard_after_forward=reshard, mp_policy=uncast, offload_policy=host)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": host}
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, **settings)
    sharded = fully_shard(root, reshard_after_forward=False, **settings)
    assert isinstance(sharded, FSDPModule)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by global denominators already, so gradients are to be added up, not averaged. The
            # factor alone would ask gloo for a reduction that it does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return sharded
