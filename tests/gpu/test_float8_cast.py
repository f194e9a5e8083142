"""The kernel that casts to float8 in both layouts, against the same in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from fourfold.models import float8

pytestmark = [
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
    torch.manual_seed(0)
    cast = torch.compile(float8._cast, dynamic=True, fullgraph=True) if compiled else float8._cast
    for num_rows, num_columns in ((176, 96), (512, 272)):
        values = torch.randn(num_rows, num_columns, device="cuda").to(source)
        amax = float8._amax(values)
        rows, columns = cast(values, amax, dtype, rows=True, columns=True)
        expected, turned = float8._cast(values.cpu(), amax.cpu(), dtype, rows=True, columns=True)
        assert columns.is_contiguous()
        assert torch.equal(columns.t().float(), rows.float())
        # a multiplication by the factor may round a number at the middle of two to the other one
        near = (rows.float().cpu() - expected.float()).abs() <= 0.25 * expected.float().abs()
        assert near.all()
        assert (rows.float().cpu() != expected.float()).float().mean() < 1e-3
        assert turned.shape == columns.shape
        nothing, only = cast(values, amax, dtype, rows=False, columns=True)
        assert nothing.numel() == 0
        assert torch.equal(only.float(), columns.float())
