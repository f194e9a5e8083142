"""The kernel that casts to float8 in both layouts, against the same in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.models import float8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # the compiler warns
]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_cast_when_by_the_kernel_gives_the_numbers_of_plain_pytorch(
    dtype: torch.dtype, source: torch.dtype, compiled: bool
) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8")
    float8._load_kernel()
    torch._dynamo.reset()
    torch.manual_seed(0)

    def cast_both(parts: list[Tensor], beside: bool, rows: bool) -> tuple[Tensor, Tensor, Tensor]:
        return float8._cast(parts, float8._largest(parts), dtype, beside=beside, rows=rows, columns=True)

    cast = torch.compile(cast_both, dynamic=True, fullgraph=True) if compiled else cast_both
    for sizes, beside in (((176,), False), ((512, 48, 208), False), ((96, 2064), True), ((256, 16, 160), True)):
        there = [torch.randn(*((2, 88, size) if beside else (size, 272))).to(source) for size in sizes]
        if beside:
            there[0] = there[0].transpose(0, 1).contiguous().transpose(0, 1)  # rows that do not follow each other
            there[-1] = torch.cat([there[-1], there[-1]], -1)[..., : sizes[-1]]  # and such that do, with gaps
        there[-1][..., -1, -1] = -7
        rows, columns, scale = cast([part.cuda() for part in there], beside, True)
        expected, turned, wanted = cast_both(there, beside, True)
        assert torch.equal(scale.cpu(), wanted)
        assert columns.is_contiguous()
        assert torch.equal(columns.t().float(), rows.float())
        # a multiplication by the factor may round a number at the middle of two to the other one
        near = (rows.float().cpu() - expected.float()).abs() <= 0.25 * expected.float().abs()
        assert near.all()
        assert (rows.float().cpu() != expected.float()).float().mean() < 1e-3
        assert turned.shape == columns.shape
        nothing, only, _ = cast([part.cuda() for part in there], beside, False)
        assert nothing.numel() == 0
        assert torch.equal(only.float(), columns.float())
