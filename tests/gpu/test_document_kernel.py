"""The kernels of attention within documents, against plain products in fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fourfold.models.document_attention import Reach, document_attention, has_kernel, reach_of
from fourfold.parallel.scores import Scores
from reach_reference import attend, keys_of, offsets_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def _inputs(queries: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    """As layers give them: keys and values parts of a longer row."""
    torch.manual_seed(0)
    query = torch.randn(1, queries, heads[0], width, device="cuda", dtype=dtype).transpose(1, 2)
    both = torch.randn(1, keys, 2 * heads[1], width, device="cuda", dtype=dtype).transpose(1, 2)
    return [tensor.detach().requires_grad_() for tensor in (query, *both.chunk(2, 1))]


def assert_as_plain(inputs: list[Tensor], reach: Reach, longest: int, scores: Scores) -> None:
    """Results and gradients are those of plain products in fp32.

    Args:
        inputs: queries, keys and values, and the sinks, if there are any.
    """
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    own, wider = (replace(scores, sinks=each[3] if len(each) > 3 else None) for each in (inputs, wide))
    out = document_attention(*inputs[:3], reach, longest, own)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected = attend(*wide[:3], reach, wider).transpose(1, 2)
    expected.backward(grad.float())
    for found, wanted in zip([out, *(t.grad for t in inputs)], [expected, *(t.grad for t in wide)], strict=True):
        assert found is not None
        assert wanted is not None
        error = (found.detach().float() - wanted.detach()).norm() / wanted.detach().norm()
        assert float(error) < (8e-3 if out.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("longest", [0, 5000])  # the two ways to cut the work
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 16), ((8, 2), 64), ((4, 1), 128)])
@pytest.mark.parametrize(
    ("lengths", "more", "window"),
    [
        ((149, 90, 260, 1, 75, 310, 110, 97), None, None),
        ((64,) * 6, None, None),
        ((1000,), None, None),
        ((333, 400), None, 100),
        ((200, 31, 64), None, 64),
        ((100, 60, 7, 200), (0, 100, 300, 0), None),
        ((30, 0, 20, 0, 0), None, None),
    ],
)
def test_kernels_give_what_plain_products_give(
    lengths: tuple[int, ...],
    more: tuple[int, ...] | None,
    window: int | None,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    longest: int,
) -> None:
    if not has_kernel(torch.device("cuda")):
        pytest.skip("the kernels are for newer GPUs")
    positions = sum(lengths)
    keys = None if more is None else keys_of(lengths, more, "cuda")
    reach = reach_of(offsets_of(lengths, "cuda"), positions, keys)
    inputs = _inputs(positions, positions + sum(more or ()), heads, width, dtype)
    assert_as_plain(inputs, reach, longest or max(lengths), Scores(0.0, 0.2, window))


@pytest.mark.parametrize("longest", [0, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 64), ((4, 1), 128), ((4, 2), 256)])
@pytest.mark.parametrize(
    ("window", "cap", "sinks"),
    [(None, 3.0, False), (100, 50.0, False), (128, None, True), (None, None, True), (70, 5.0, True)],
)
def test_kernels_when_scores_are_capped_or_sink_give_what_plain_products_give(
    window: int | None,
    cap: float | None,
    sinks: bool,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    longest: int,
) -> None:
    if not has_kernel(torch.device("cuda")):
        pytest.skip("the kernels are for newer GPUs")
    lengths = (149, 90, 260, 1, 75, 310)
    reach = reach_of(offsets_of(lengths, "cuda"), sum(lengths))
    inputs = _inputs(sum(lengths), sum(lengths), heads, width, dtype)
    if sinks:
        inputs.append(torch.linspace(-3, 3, heads[0], device="cuda").to(dtype).requires_grad_())
    assert_as_plain(inputs, reach, longest or max(lengths), Scores(0.0, None, window, cap))


def test_kernels_when_run_twice_give_the_same_numbers() -> None:
    if not has_kernel(torch.device("cuda")):
        pytest.skip("the kernels are for newer GPUs")
    lengths = (149, 90, 260, 130, 75, 310)
    reach = reach_of(offsets_of(lengths, "cuda"), sum(lengths))
    runs = []
    for _ in range(2):
        inputs = _inputs(sum(lengths), sum(lengths), (8, 2), 128, torch.bfloat16)
        out = document_attention(*inputs, reach, max(lengths), Scores())
        out.sum().backward()
        runs.append([out.detach(), *(tensor.grad for tensor in inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))  # type: ignore[arg-type]
