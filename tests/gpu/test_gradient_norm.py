"""The norm of large and small gradients on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fourfold.parallel.reduce import gradient_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [[(2**20,)], [(3, 1001, 1013), (7,), (2**11, 2**10), (2**21 + 5,)], [(5, 5)]])
def test_norm_when_gradients_are_large_is_that_of_fp64(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda"))
        parameter.grad = torch.randn(shape, generator=generator, device="cuda").to(dtype)
        parameters.append(parameter)
    expected = torch.stack([p.grad.double().square().sum() for p in parameters]).sum().sqrt()
    found = gradient_norm(parameters)
    assert found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    assert torch.equal(found, gradient_norm(parameters))


def test_norm_when_a_large_gradient_is_no_number_is_none() -> None:
    parameter = nn.Parameter(torch.zeros(2**20, device="cuda"))
    parameter.grad = torch.zeros(2**20, device="cuda")
    parameter.grad[-1] = float("inf")
    assert not torch.isfinite(gradient_norm([parameter]))
