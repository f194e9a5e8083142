"""Tensors that may be sharded: making them whole, and cutting a whole one alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank of its mesh must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_alike(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor placed as `like` is, on its device; nothing is sent, every rank has the whole."""
    on_device = whole.to(like.device)
    if not isinstance(like, DTensor):
        return on_device
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Write a whole tensor into one that may be sharded, in place."""
    placed = cut_alike(whole, target)
    if isinstance(target, DTensor) and isinstance(placed, DTensor):
        target.to_local().copy_(placed.to_local())
    else:
        target.copy_(placed)
