"""Attention told who sees what: what is told, and what surrounds the kernels, which run on GPUs alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourfold.models import attention, document_attention
from fourfold.models.attention import packed_attention
from fourfold.models.document_attention import has_kernel, reach_of, takes
from fourfold.parallel.context import ContextParallel, ContextRows
from fourfold.parallel.scores import Scores
from reach_reference import attend, in_rows, keys_of, offsets_of, visible


@pytest.mark.parametrize("lengths", [(5, 1, 9), (7,), (3, 0, 4, 0, 0)])
def test_reach_of_a_row_is_causal_within_each_document(lengths: tuple[int, ...]) -> None:
    of_queries, of_keys = reach = reach_of(offsets_of(lengths), sum(lengths))
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    assert torch.equal(visible(reach, None), expected)
    queries = torch.arange(sum(lengths))[:, None]
    assert torch.equal((queries >= of_keys[0]) & (queries < of_keys[1]), expected)
    assert of_queries.dtype == of_keys.dtype == torch.int32


def test_reach_of_documents_with_further_keys_ends_at_their_own() -> None:
    lengths, more = (3, 2, 4), (2, 0, 1)
    of_queries, of_keys = reach_of(offsets_of(lengths), 9, keys_of(lengths, more))
    blocks = (torch.ones(n, n + m).tril(m) for n, m in zip(lengths, more, strict=True))
    expected = torch.block_diag(*blocks).bool()
    assert torch.equal(visible((of_queries, of_keys), None), expected)
    queries = torch.arange(9)[:, None]
    assert torch.equal((queries >= of_keys[0]) & (queries < of_keys[1]), expected)
    for row in (*of_queries, *of_keys):
        assert torch.equal(row, row.sort().values)  # what the kernels rely on


@pytest.fixture
def on_cpu() -> Iterator[list[int]]:
    """Plain products in the kernels' places; counts how often they are called."""
    calls = [0, 0]

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        of_queries: Tensor,
        of_keys: Tensor,
        window: int | None,
        longest: int,
        scale: float,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        out = attend(query, key, value, (of_queries, of_keys), Scores(0.0, scale, window, cap, sinks))
        return in_rows(out), query.new_zeros(query.shape[1:3], dtype=torch.float32)

    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        sums: Tensor,
        of_queries: Tensor,
        of_keys: Tensor,
        window: int | None,
        longest: int,
        scale: float,
        cap: float | None,
    ) -> tuple[Tensor, ...]:
        calls[1] += 1
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            own = None if sinks is None else sinks.detach().float().requires_grad_()
            made = attend(*inputs, (of_queries, of_keys), Scores(0.0, scale, window, cap, own))
            found = torch.autograd.grad(made, inputs if own is None else [*inputs, own], grad)
            return *map(in_rows, found[:3]), sums.new_empty(0) if own is None else found[3]

    library = torch.library.Library("fourfold", "FRAGMENT")
    library.impl("documents", forward, "CPU")
    library.impl("documents_back", backward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize(
    ("window", "shares", "sinks", "cap"),
    [
        (None, False, False, None),
        (4, False, False, None),
        (None, True, False, None),
        (4, False, True, None),
        (None, False, False, 2.0),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("default")
def test_attention_when_told_who_sees_what_gives_what_documents_give_one_by_one(
    compiled: bool, window: int | None, shares: bool, sinks: bool, cap: float | None, on_cpu: list[int]
) -> None:
    torch._dynamo.reset()
    lengths = (11, 2, 19)
    offsets, keys = offsets_of(lengths), keys_of(lengths, (0, 9, 2)) if shares else None
    if keys is not None:
        own = [range(11), (*range(9), 11, 12), (11, 12, *range(13, 32))]
        keys.index.copy_(torch.tensor([place for document in own for place in document]))
        seen = [*range(11, 20), *[-1] * 2, *range(22, 24), *[-1] * 19]
        keys.places.copy_(torch.tensor([[*range(11), 20, 21, *range(24, 43)], seen]))
    results = []
    for told in (False, True):

        def attend_row(
            query: Tensor, key: Tensor, value: Tensor, own: Tensor | None = None, told: bool = told
        ) -> Tensor:
            known: dict[str, object] = {"longest": 32, "reach": reach_of(offsets, 32, keys)}
            return packed_attention(
                nn.Identity(),
                query,
                key,
                value,
                None,
                cu_seqlens=offsets,
                sliding_window=window,
                softcap=cap,
                s_aux=own,
                keys=keys,
                **(known if told else {"lengths": lengths}),  # type: ignore[arg-type]
            )[0]

        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, 32, heads, 16, generator=generator).bfloat16().transpose(1, 2) for heads in (4, 2, 2)]
        inputs += [torch.tensor([0.3, -1.0, 2.0, 0.0]).bfloat16()] if sinks else []
        inputs = [tensor.requires_grad_() for tensor in inputs]
        run = torch.compile(attend_row, backend="aot_eager", fullgraph=True) if compiled and told else attend_row
        out = run(*inputs)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    assert on_cpu == [1, 1]
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (7, None), (7, 2.0)])
def test_attention_of_a_part_of_a_row_by_who_sees_what_gives_what_documents_give(
    window: int | None, cap: float | None, on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    scores = Scores(sliding_window=window, softcap=cap)
    for rank in range(2):
        context = ContextParallel(None, rank, 2, "allgather")  # type: ignore[arg-type] - nothing is sent
        rows = ContextRows(context, ((11, 2, 19),), torch.device("cpu"))
        monkeypatch.setattr(ContextParallel, "gather", lambda _, whole: whole)
        inputs = [torch.randn(1, heads, size, 16).bfloat16() for heads, size in ((4, 16), (2, 32), (2, 32))]
        results = []
        for told in (False, True):
            monkeypatch.setattr(document_attention, "has_kernel", lambda _, told=told: told)
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            out = checkpoint(attention._in_context, *leaves, rows, scores, use_reentrant=False)
            assert isinstance(out, Tensor)
            out.backward(torch.ones_like(out))
            results.append([out.detach(), *(tensor.grad for tensor in leaves)])
        for expected, found in zip(*results, strict=True):
            assert expected is not None
            torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
    assert on_cpu == [4, 2]  # the layers of such runs are computed again


def test_kernels_when_heads_are_of_other_widths_or_wider_numbers_are_not_for_them() -> None:
    half = torch.empty(1, 2, 3, 64, dtype=torch.bfloat16)
    plain = Scores()
    assert takes(half, half, plain)
    assert takes(half, half, Scores(softcap=50.0, sinks=torch.zeros(2)))
    assert not takes(half.float(), half.float(), plain)
    assert not takes(half[..., :48], half[..., :48], plain)
    assert not takes(half, half[..., :32], plain)
    assert not takes(half, half, Scores(dropout=0.1))
    few, many = (torch.empty(1, 2, positions, 256, dtype=torch.bfloat16) for positions in (2048, 2049))
    assert takes(few, few, plain)
    assert takes(many, many, Scores(softcap=50.0))
    assert not takes(many, many, plain)  # torch's own kernel is the faster one
    assert not has_kernel(torch.device("cpu"))
