"""Shards of FSDP's gradients that lie in the computing stream's memory are the same gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fourfold.parallel.fsdp import join_gradients, shard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

_SIZE = 512


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stream_of(found: Tensor) -> int:
    """For which stream the allocator keeps the memory of a tensor."""
    place = found.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= place < segment["address"] + segment["total_size"]:
            return segment["stream"]
    raise AssertionError("not the allocator's memory")


def _gradients(batches: int, *, joined: bool) -> list[Tensor]:
    """Local gradients of a small model after so many micro-batches."""
    torch.manual_seed(0)
    root = nn.Sequential(*(nn.Linear(_SIZE, _SIZE) for _ in range(4))).cuda()
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("dp_shard",))
    shard(root, list(root)[1:], mesh, reshard=True, compute=torch.bfloat16)
    if joined:
        join_gradients(root)
    for number in range(batches):
        x = torch.randn(64, _SIZE, device="cuda", generator=torch.Generator("cuda").manual_seed(number))
        root(x).float().square().mean().backward()
    torch.cuda.synchronize()
    found = [parameter.grad for parameter in root.parameters()]
    assert all(isinstance(each, DTensor) for each in found)
    return [each.to_local() for each in found if isinstance(each, DTensor)]


@pytest.mark.parametrize("batches", [1, 3])
def test_gradients_when_joined_are_the_same_in_other_memory(batches: int) -> None:
    apart, joined = _gradients(batches, joined=False), _gradients(batches, joined=True)
    assert len(apart) == len(joined) == 8
    for one, other in zip(apart, joined, strict=True):
        assert torch.equal(one, other)
    computing = torch.cuda.default_stream().cuda_stream
    assert {_stream_of(each) for each in joined} == {computing}
    assert computing not in {_stream_of(each) for each in apart}
