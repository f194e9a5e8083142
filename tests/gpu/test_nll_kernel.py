"""The loss's kernels on a GPU, against PyTorch's cross entropy in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fourfold.dataset.batch import IGNORE_INDEX
from fourfold.models.token_nll import token_nll

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 11), (300, 49_152), (257, 151_936), (5, 128_256), (33, 4_097)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_token_nll_when_compared_with_cross_entropy_gives_the_same(
    rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    drawn = torch.randn(rows, vocabulary, generator=generator, device="cuda") * 3
    logits = drawn.to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device="cuda")
    targets[::4] = IGNORE_INDEX
    weights = torch.randn(rows, generator=generator, device="cuda")
    other = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(other, targets, reduction="none", ignore_index=IGNORE_INDEX)
    (expected * weights).sum().backward()
    found = token_nll(logits, targets)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert logits.grad is not None
    assert other.grad is not None
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(logits.grad.float(), other.grad, rtol=rtol, atol=1e-7)


def test_token_nll_when_numbers_are_more_than_32_bits_count_reaches_the_last_row() -> None:
    rows, vocabulary = 2**31 // 151_936 + 2, 151_936
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda").requires_grad_()
    targets = torch.full((rows,), vocabulary - 1, device="cuda")
    found = token_nll(logits, targets)
    found.sum().backward()
    expected = torch.log(torch.tensor(float(vocabulary)))
    torch.testing.assert_close(found.cpu(), expected.expand(rows), rtol=1e-6, atol=1e-5)
    assert logits.grad is not None
    last = logits.grad[-1].float()
    torch.testing.assert_close(last[-1].cpu(), torch.tensor(1 / vocabulary - 1), rtol=0.01, atol=0)
    torch.testing.assert_close(last[:-1].max().cpu(), torch.tensor(1 / vocabulary), rtol=0.01, atol=0)
