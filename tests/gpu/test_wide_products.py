"""Products of wide masters on a GPU: gradients are written in fp32, not rounded on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fourfold.models.masters import use_wide_products

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_gradients_of_masters_when_products_are_narrow_are_not_rounded(compute: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 384, bias=False, device="cuda")
    assert use_wide_products([layer], compute) == 1
    x = torch.randn(2, tokens // 2, 256, device="cuda", dtype=compute, requires_grad=True)
    grad = torch.randn(2, tokens // 2, 384, device="cuda", dtype=compute)
    with torch.autocast("cuda", compute):
        out = layer(x)
    assert out.dtype == compute
    out.backward(grad)
    flat_x, flat_grad = x.detach().double().flatten(0, 1), grad.double().flatten(0, 1)
    narrow = layer.weight.detach().to(compute).double()
    for found, exact, near in (
        (out.detach().flatten(0, 1), flat_x @ narrow.t(), 1e-2),
        (x.grad, (flat_grad @ narrow).view(x.shape), 1e-2),
        (layer.weight.grad, flat_grad.t() @ flat_x, 1e-5),
    ):
        assert found is not None
        assert float((found.double() - exact).abs().max()) <= near * float(exact.abs().max())
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
