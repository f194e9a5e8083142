"""Kernels of experts' rows on a GPU, against the same arithmetic in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.parallel.expert_rows import combine, sort_choices, spread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
_EXPERTS = 16


def results(
    tokens: int, choices: int, width: int, dtype: torch.dtype, *, wide: bool, compiled: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows, sums, and gradients of tokens, rows and weights; found, and what is expected of the same numbers."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda").to(dtype)

    indices = torch.rand(tokens, _EXPERTS, generator=generator, device="cuda").topk(choices).indices
    _, order, inverse = sort_choices(indices)
    given = [draw(tokens, width), draw(tokens * choices, width), draw(tokens, choices)]
    grads = [draw(tokens * choices, width), draw(tokens, width)]

    def run(hidden: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.float32 if wide else hidden.dtype
        return spread(hidden, order, inverse), combine(rows, weights, order, inverse, out)

    found = [each.clone().requires_grad_() for each in given]
    outputs = (torch.compile(run, fullgraph=True, dynamic=True) if compiled else run)(*found)
    torch.autograd.backward(outputs, [grads[0], grads[1].to(outputs[1].dtype)])

    expected = [each.float().requires_grad_() for each in given]
    plain = (
        expected[0][order // choices],
        (expected[1][inverse] * expected[2][..., None]).sum(1),
    )
    torch.autograd.backward(plain, [each.float() for each in grads])
    return [*outputs, *(each.grad for each in found)], [*plain, *(each.grad for each in expected)]  # type: ignore[list-item]


@pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "choices", "width"), [(1, 1, 32), (300, 8, 2048), (77, 2, 3000), (129, 6, 7168)])
@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_rows_when_compared_with_plain_arithmetic_give_the_same(
    tokens: int, choices: int, width: int, dtype: torch.dtype, wide: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    for found, expected in zip(*results(tokens, choices, width, dtype, wide=wide, compiled=compiled), strict=True):
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-4
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.float(), expected.detach(), rtol=rtol, atol=rtol * scale / 8)


def test_rows_when_numbers_are_more_than_32_bits_count_reach_the_last() -> None:
    tokens, width = 2**31 // 8192 + 3, 8192
    order = inverse = torch.arange(tokens, device="cuda")
    rows = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    rows[-1] = 2.0
    weights = torch.full((tokens, 1), 0.5, dtype=torch.bfloat16, device="cuda").requires_grad_()
    sums = combine(rows, weights, order, inverse[:, None], torch.bfloat16)
    assert sums[-1].unique().tolist() == [1.0]
    sums.backward(torch.ones_like(sums))
    assert weights.grad is not None
    assert weights.grad[-1].item() == 2.0 * width
    assert weights.grad[-2].item() == 0.0
