"""Fully sharded data parallelism (ZeRO stages 1 to 3, with or without replicas) by PyTorch's FSDP2.

A layer is the unit: its weights are gathered whole for its forward and backward pass, so the largest layer with its
gradient must fit a device, not the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    zero: int,
    compute: torch.dtype | None,
    apart: Sequence[nn.Module] = (),
    apart_mesh: DeviceMesh | None = None,
) -> FSDPModule:
    """Shard a model's parameters, in place, over a mesh.

    Args:
        root: the module whose forward pass is called; what no block holds (embedding, last norm, head) is its own unit.
        blocks: the decoder layers.
        mesh: [dp_shard] or [dp_replicate, dp_shard].
        zero: 3 frees gathered weights after each forward pass, 1 and 2 keep them.
        compute: dtype of gathered weights and of the computation; None for that of the parameters.
        apart: modules of the blocks that fewer ranks hold alike (a part of the experts), which are their own units.
        apart_mesh: those ranks, [dp_shard] or [dp_replicate, dp_shard].
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    for module in apart:
        # Their inputs stay as the layer made them: routers may weight in fp32.
        fully_shard(
            module,
            mesh=apart_mesh,
            reshard_after_forward=zero == 3,
            mp_policy=replace(policy, cast_forward_inputs=False),
        )
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=zero == 3, mp_policy=policy)
    sharded = fully_shard(root, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    assert isinstance(sharded, FSDPModule)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by global denominators already, so gradients are to be added up, not averaged. The
            # factor alone would ask gloo for a reduction that it does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return sharded
