"""The norm of gradients: PyTorch's in fp32, and as exact for gradients in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fourfold.parallel.reduce import gradient_norm


def _parameters(dtypes: list[torch.dtype]) -> list[nn.Parameter]:
    generator, found = torch.Generator().manual_seed(0), []
    for number, dtype in enumerate(dtypes):
        parameter = nn.Parameter(torch.zeros(30 + number, 7, dtype=dtype))
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        found.append(parameter)
    return [*found, nn.Parameter(torch.zeros(3))]  # the last has no gradient


def test_norm_of_fp32_is_pytorchs_to_the_bit() -> None:
    parameters = _parameters([torch.float32] * 3)
    expected = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    assert torch.equal(gradient_norm(parameters), expected)


@pytest.mark.parametrize(
    "dtypes",
    [[torch.bfloat16] * 3, [torch.float16], [torch.bfloat16, torch.float32, torch.bfloat16], [torch.float64] * 2],
)
def test_norm_when_gradients_have_16_bits_is_not_rounded_to_them(dtypes: list[torch.dtype]) -> None:
    parameters = _parameters(dtypes)
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    found = gradient_norm(parameters)
    torch.testing.assert_close(found.double(), torch.stack(squares).sum().sqrt(), rtol=1e-6, atol=0)


def test_norm_without_gradients_is_zero() -> None:
    assert gradient_norm([nn.Parameter(torch.zeros(3))]) == 0
