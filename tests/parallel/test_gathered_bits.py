"""Packed weights are gathered as they are, also where a copy of 16-bit floats makes all NaNs the same one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from harness import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from fourfold.parallel.fsdp import shard

_copy = torch._foreach_copy_


def _quieting_copy(own: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """As on CUDA, by way of floats of 32 bits."""
    _copy(own, other)
    for tensor in own:
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.view(torch.int16).masked_fill_(tensor.isnan(), 0x7FFF)


def _all_pairs() -> Linear4bit:
    """A layer [2048, 128] whose packed bytes are all that two bytes can be."""
    layer = Linear4bit(128, 2048, bias=False, quant_storage=torch.uint8)
    layer.load_state_dict({"weight": torch.randn(2048, 128)})
    layer.to("cpu")
    weight: Any = layer.weight
    weight.data.copy_(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.uint8).view(-1, 1))
    return layer


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, None], ids=str)
def test_packed_weights_when_gathered_have_the_bytes_they_had(compute: torch.dtype | None) -> None:
    def work() -> int:
        root = nn.Sequential(nn.Sequential(_all_pairs(), nn.Linear(2048, 4)))
        expected = root[0][0].weight.data.clone()
        with mock.patch.object(torch, "_foreach_copy_", _quieting_copy):
            shard(root, [root[0]], init_device_mesh("cpu", (2,)), reshard=True, compute=compute)
            assert isinstance(root[0], FSDPModule)
            root[0].unshard()
        found = root[0][0].weight.data.view(torch.uint8).view(-1, 1)
        return int((found != expected).sum())

    assert run_ranks(2, work) == [0, 0]
