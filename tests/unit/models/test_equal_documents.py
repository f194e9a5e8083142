"""Rows of equally long documents: which are taken, and that a batch of them gives what documents give one by one.

cuDNN's kernels run on GPUs alone; what surrounds them is tried with PyTorch's own attention in their place.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.models.attention import packed_attention
from fourfold.models.equal_documents import EqualDocuments, equal_documents, takes
from reach_reference import in_rows


def _attention(query: Tensor, key: Tensor, value: Tensor, documents: int, scale: float | None) -> Tensor:
    batch = (tensor[0].unflatten(1, (documents, -1)).transpose(0, 1) for tensor in (query, key, value))
    made = F.scaled_dot_product_attention(*batch, is_causal=True, scale=scale, enable_gqa=True)
    return made.transpose(0, 1).flatten(1, 2)[None]


@pytest.fixture
def on_cpu() -> Iterator[None]:
    def forward(
        query: Tensor, key: Tensor, value: Tensor, documents: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        assert query.transpose(1, 2).is_contiguous()  # as layers give them
        sums = query.new_zeros((documents, query.shape[1], query.shape[2] // documents, 1), dtype=torch.float32)
        return in_rows(_attention(query, key, value, documents, scale)), sums

    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        sums: Tensor,
        documents: int,
        scale: float | None,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            found = torch.autograd.grad(_attention(*inputs, documents, scale), inputs, grad)
        return tuple(map(in_rows, found))

    library = torch.library.Library("fourfold", "FRAGMENT")
    library.impl("equal_documents", forward, "CPU")
    library.impl("equal_documents_back", backward, "CPU")
    yield
    library._destroy()


def _inputs(positions: int, *, heads: int = 4, kv_heads: int = 2, width: int = 16) -> list[Tensor]:
    """Queries, keys and values as layers give them: heads before positions, in memory behind them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, positions, count, width) for count in (heads, kv_heads, kv_heads)]
    made = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("on_cpu")
def test_attention_when_documents_are_equal_gives_what_they_give_one_by_one(
    compiled: bool, scale: float | None
) -> None:
    lengths = (24, 24, 24)
    offsets = torch.tensor([0, 24, 48, 72], dtype=torch.int32)
    results = []
    for documents in (0, 3):

        def attention(query: Tensor, key: Tensor, value: Tensor, documents: int = documents) -> Tensor:
            known: dict[str, object] = {"longest": 72, "documents": documents} if documents else {"lengths": lengths}
            return packed_attention(
                nn.Identity(),
                query,
                key,
                value,
                None,
                cu_seqlens=offsets,
                scaling=scale,
                **known,  # type: ignore[arg-type]
            )[0]

        run = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled and documents else attention
        inputs = _inputs(72)
        out = run(*inputs)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("on_cpu")
def test_document_when_another_changes_stays_the_same() -> None:
    first, other = _inputs(64), _inputs(64)
    other[1].data[:, :, 32:] += 1.0
    one, two = (equal_documents(*inputs, 2, None)[0] for inputs in (first, other))
    assert torch.equal(one[:32], two[:32])
    assert not torch.equal(one[32:], two[32:])


def test_documents_when_a_shape_comes_back_are_taken_as_equal() -> None:
    equal = EqualDocuments(4096)
    assert [equal.of((2048, 2048)) for _ in range(4)] == [0, 0, 2, 2]
    assert [equal.of((3000,)) for _ in range(3)] == [0, 0, 1]
    assert equal.of((2048, 2048)) == 2


def test_documents_when_they_fill_their_rows_are_taken_at_once() -> None:
    assert EqualDocuments(4096).of((4096, 4096)) == 2


@pytest.mark.parametrize("lengths", [(2048, 2000), (512, 512), (2048, 2048, 16)])
def test_documents_when_unequal_or_short_are_not_taken(lengths: tuple[int, ...]) -> None:
    equal = EqualDocuments(4096)
    assert [equal.of(lengths) for _ in range(5)] == [0] * 5


def test_documents_when_shapes_are_many_are_taken_of_the_first_alone() -> None:
    equal = EqualDocuments(4096)
    for length in range(1024, 1024 + 20):
        equal.of((length,))
    assert [equal.of((1024,)) for _ in range(2)] == [0, 1]
    assert [equal.of((1043,)) for _ in range(5)] == [0] * 5


@pytest.mark.parametrize(
    ("width", "value_width", "dtype", "taken"),
    [
        (128, 128, torch.bfloat16, True),
        (64, 64, torch.float16, True),
        (128, 128, torch.float32, False),
        (192, 128, torch.bfloat16, False),
        (256, 256, torch.bfloat16, False),
        (100, 100, torch.bfloat16, False),
    ],
)
def test_heads_when_the_kernel_knows_their_width_are_taken(
    width: int, value_width: int, dtype: torch.dtype, taken: bool
) -> None:
    query, value = (torch.empty(1, 2, 4, size, dtype=dtype) for size in (width, value_width))
    assert takes(query, value) == taken
