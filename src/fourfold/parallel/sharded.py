"""Tensors that FSDP may have sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank of its mesh must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
