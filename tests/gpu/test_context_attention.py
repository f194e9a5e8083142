"""The flash kernels of context parallelism on a GPU, each rank's part computed by one process without a group."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fourfold.models.attention import attend, packed_attention
from fourfold.models.document_attention import reach_of
from fourfold.parallel.context import ContextParallel, ContextRows, Method
from fourfold.parallel.ring_kernels import FlashKernel, PlainKernel
from fourfold.parallel.scores import Scores
from reach_reference import attend as plain_attention
from reach_reference import offsets_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_ROWS = ((50, 7, 180, 19), (256,))
_WINDOWS = [None, 1, 40, 100]


def _rows(rank: int, size: int, method: Method) -> ContextRows:
    context = ContextParallel(None, rank, size, method)  # type: ignore[arg-type] - nothing is sent
    return ContextRows(context, _ROWS, torch.device("cuda"))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _close(found: Tensor, expected: Tensor) -> None:
    """Within bf16's rounding: a hundredth of the largest."""
    one, other = found.detach().float(), expected.detach().float()
    assert float((one - other).abs().max()) <= 1e-2 * float(other.abs().max()) + 1e-3


@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
def test_flash_attention_with_sinks_gives_what_plain_products_give(
    window: int | None, heads: int, kv_heads: int
) -> None:
    torch.manual_seed(0)
    lengths = (50, 7, 180, 19)
    tensors = [_random(1, count, 256, 64) for count in (heads, kv_heads, kv_heads)]
    leaves = [t.requires_grad_() for t in (*tensors, torch.linspace(-3, 3, heads, device="cuda").bfloat16())]
    plain = [t.detach().float().requires_grad_() for t in leaves]
    offsets, grad = offsets_of(lengths, "cuda"), _random(1, 256, heads, 64)
    out, _ = packed_attention(
        nn.Identity(), *leaves[:3], None, lengths=lengths, cu_seqlens=offsets, sliding_window=window, s_aux=leaves[3]
    )
    out.backward(grad)
    expected = plain_attention(*plain[:3], reach_of(offsets, 256), Scores(sliding_window=window, sinks=plain[3]))
    expected.transpose(1, 2).backward(grad.float())
    _close(out, expected.transpose(1, 2))
    for found, wanted in zip(leaves, plain, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        _close(found.grad, wanted.grad)


def test_flash_kernel_when_pieces_go_round_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    window, scores = None, Scores()  # with a window the plain one is used
    for rank, source in itertools.product(range(2), repeat=2):
        for piece in _rows(rank, 2, "ring").pieces(source, window):
            num_queries, num_keys = (sum(numbers) for numbers in zip(*piece.documents, strict=True))
            q, k, v = _random(8, num_queries, 64), _random(2, num_keys, 64), _random(2, num_keys, 64)
            grad = _random(8, num_queries, 64)
            out, lse = PlainKernel().forward(q, k, v, piece, scores)
            flash_out, flash_lse = FlashKernel().forward(q, k, v, piece, scores)
            _close(flash_out, out)
            torch.testing.assert_close(flash_lse, lse, rtol=1e-3, atol=1e-3)
            # as if other pieces had brought half of the weight
            wider, halved = lse + 0.7, out.to(torch.bfloat16) * 0.5
            expected = PlainKernel().backward(grad, q, k, v, halved, wider, piece, scores)
            for found, plain in zip(
                FlashKernel().backward(grad, q, k, v, halved, wider, piece, scores), expected, strict=True
            ):
                _close(found, plain)


@pytest.mark.parametrize("window", _WINDOWS)
def test_attention_when_keys_are_gathered_equals_fp32(window: int | None) -> None:
    torch.manual_seed(0)
    scores = Scores(sliding_window=window)
    key, value = _random(2, 2, 256, 64), _random(2, 2, 256, 64)
    for rank in range(2):
        for stretch, query in ((s, _random(2, 8, 64, 64)) for s in _rows(rank, 2, "allgather").stretches):
            leaves = [t.clone().requires_grad_() for t in (query, key, value)]
            plain = [t.float().requires_grad_() for t in (query, key, value)]
            out, expected = (attend(*tensors, stretch, scores) for tensors in (leaves, plain))
            _close(out, expected)
            grad = _random(*out.shape)
            out.backward(grad)
            expected.backward(grad.float())
            for leaf, exact in zip(leaves, plain, strict=True):
                assert leaf.grad is not None
                assert exact.grad is not None
                _close(leaf.grad, exact.grad)
