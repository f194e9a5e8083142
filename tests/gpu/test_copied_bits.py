"""What FSDP copies into and out of a gather, on the GPU, where a copy of 16-bit floats makes all NaNs the same one."""

from __future__ import annotations

import pytest
import torch

from fourfold.parallel import fsdp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_when_gathered_keep_their_bits(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cuda").view(dtype)
    fsdp._copy_bits()
    parts, sizes = [every, every.flip(0)], [every.numel()] * 2
    room = torch.zeros(4 * every.numel(), dtype=dtype, device="cuda")
    _, both = torch.ops.fsdp.all_gather_copy_in(parts, room, sizes, sum(sizes), 1)
    out = [torch.zeros(2, every.numel(), dtype=dtype, device="cuda") for _ in parts]
    torch.ops.fsdp.split_with_sizes_copy(both.view(2, -1), sizes, dim=1, out=out)
    for found, expected in zip(out, parts, strict=True):
        assert torch.equal(found[1].view(torch.int16), expected.view(torch.int16))
