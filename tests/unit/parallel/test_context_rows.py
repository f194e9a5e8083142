"""Which keys each rank's queries see by every method, and the ring's kernel against autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.parallel.context import ContextParallel, ContextRows, Method
from fourfold.parallel.ring_kernels import PlainKernel
from fourfold.parallel.scores import Scores
from reach_reference import visible

_CPU = torch.device("cpu")
_ROWS = ((5, 1, 18, 8), (32,), (3, 3, 3, 3, 3, 3, 3, 11))
"""Documents of rows of 32 positions: within a chunk, over a few, over all."""


def _rows(rank: int, size: int, method: Method) -> ContextRows:
    context = ContextParallel(None, rank, size, method)  # type: ignore[arg-type] - nothing is sent
    return ContextRows(context, _ROWS, _CPU)


def _positions(context: ContextParallel, rank: int) -> list[int]:
    """The positions of a row that a rank has."""
    chunk = 32 // context.num_chunks
    return [number * chunk + i for number in context.chunks_of(rank) for i in range(chunk)]


def _visible(window: int | None) -> Tensor:
    """[rows, 32, 32] bool by the definition."""
    documents = torch.stack([torch.repeat_interleave(torch.tensor(lengths)) for lengths in _ROWS])
    distance = torch.arange(32)[:, None] - torch.arange(32)
    near = distance < (window or 32)
    return (documents[:, :, None] == documents[:, None]) & (distance >= 0) & near


@pytest.mark.parametrize("size", [2, 4])
def test_chunks_when_shared_are_everyones_once(size: int) -> None:
    for method in ("allgather", "ulysses", "ring"):
        context = _rows(0, size, method).context
        found = sorted(itertools.chain.from_iterable(_positions(context, rank) for rank in range(size)))
        assert found == list(range(32))


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
@pytest.mark.parametrize("size", [2, 4])
def test_reach_when_keys_are_those_of_the_whole_row_is_what_queries_see(
    size: int, method: Method, window: int | None
) -> None:
    for row, rank in itertools.product(range(len(_ROWS)), range(size)):
        rows = ContextRows(_rows(rank, size, method).context, _ROWS[row : row + 1], _CPU)
        positions = list(range(32)) if method == "ulysses" else _positions(rows.context, rank)
        expected = _visible(window)[row, positions]
        of_queries, of_keys = reach = rows.reach(window)
        assert torch.equal(visible(reach, None), expected)
        queries = torch.arange(len(positions))[:, None]
        assert torch.equal((queries >= of_keys[0]) & (queries < of_keys[1]), expected)
        for each in (*of_queries, *of_keys):
            assert torch.equal(each, each.sort().values)  # what the kernels rely on
            assert each.dtype == torch.int32
        assert rows.longest == max(_ROWS[row])


@pytest.mark.parametrize("size", [2, 4])
def test_stretches_when_keys_are_gathered_show_each_query_its_keys(size: int) -> None:
    expected = _visible(None)
    for rank in range(size):
        rows = _rows(rank, size, "allgather")
        for number, stretch in zip(rows.context.chunks, rows.stretches, strict=True):
            first = number * (32 // rows.context.num_chunks)
            for row, ((start, stop), documents) in enumerate(zip(stretch.keys, stretch.documents, strict=True)):
                query, key = first, start
                for num_queries, num_keys in documents:
                    for i in range(num_queries):
                        seen = torch.zeros(32, dtype=torch.bool)
                        seen[key : key + num_keys - (num_queries - 1 - i)] = True
                        assert torch.equal(seen, expected[row, query + i])
                    query, key = query + num_queries, key + num_keys
                assert key == stop


@pytest.mark.parametrize("window", [None, 1, 3, 8, 20])
@pytest.mark.parametrize("size", [2, 4])
def test_pieces_when_keys_go_round_show_each_query_its_keys_once(size: int, window: int | None) -> None:
    found = torch.zeros(len(_ROWS), 32, 32, dtype=torch.int)
    for rank, source in itertools.product(range(size), repeat=2):
        rows = _rows(rank, size, "ring")
        queries, keys = _positions(rows.context, rank), _positions(rows.context, source)
        for piece in rows.pieces(source, window):
            (q, _), (k, _) = piece.queries, piece.keys
            for num_queries, num_keys in piece.documents:
                for i, j in itertools.product(range(num_queries), range(num_keys)):
                    if 0 <= piece.distance + i - j < (window or 32):
                        assert queries[q + i] - keys[k + j] == piece.distance + i - j
                        found[piece.row, queries[q + i], keys[k + j]] += 1
                q, k = q + num_queries, k + num_keys
    assert torch.equal(found, _visible(window).int())


def test_pieces_when_windowed_let_every_query_see_the_last_key() -> None:
    """What the flash kernel's window relies on, and what keeps empty rows out of the softmax."""
    for rank, source in itertools.product(range(4), repeat=2):
        for window in (1, 3, 8):
            for piece in _rows(rank, 4, "ring").pieces(source, window):
                if piece.distance:
                    [(num_queries, num_keys)] = piece.documents
                    assert piece.distance + num_queries - 1 - (num_keys - 1) < window


@pytest.mark.parametrize(
    "scores",
    [Scores(), Scores(scaling=0.3, sliding_window=3), Scores(softcap=2.0), Scores(softcap=1.5, sliding_window=5)],
)
def test_plain_kernel_when_differentiated_equals_autograd(scores: Scores) -> None:
    torch.manual_seed(0)
    rows = _rows(0, 2, "ring")
    for piece in (*rows.pieces(0, scores.sliding_window), *rows.pieces(1, scores.sliding_window)):
        num_queries, num_keys = (sum(numbers) for numbers in zip(*piece.documents, strict=True))
        q, k, v = torch.randn(4, num_queries, 8), torch.randn(2, num_keys, 8), torch.randn(2, num_keys, 6)
        grad = torch.randn(4, num_queries, 6)
        leaves = [t.double().requires_grad_() for t in (q, k, v)]
        out, lse = _reference(*leaves, piece, scores)
        out.backward(grad.double())
        found_out, found_lse = PlainKernel().forward(q, k, v, piece, scores)
        torch.testing.assert_close(found_out, out.detach().float())
        torch.testing.assert_close(found_lse, lse.detach().float())
        found = PlainKernel().backward(grad, q, k, v, found_out, found_lse, piece, scores)
        for by_hand, leaf in zip(found, leaves, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(by_hand, leaf.grad.float(), rtol=1e-4, atol=1e-5)


def _reference(q: Tensor, k: Tensor, v: Tensor, piece: Any, scores: Scores) -> tuple[Tensor, Tensor]:
    """By one mask over the whole piece."""
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    found = q @ k.mT * scores.scale(q.shape[-1])
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    numbers = [torch.tensor(sizes) for sizes in zip(*piece.documents, strict=True)]
    of_query, of_key = (torch.repeat_interleave(sizes) for sizes in numbers)
    in_query, in_key = (torch.cat([torch.arange(int(size)) for size in sizes]) for sizes in numbers)
    after = piece.distance + in_query[:, None] - in_key
    seen = (of_query[:, None] == of_key) & (after >= 0) & (after < (scores.sliding_window or 10**6))
    found = found.masked_fill(~seen, float("-inf"))
    return found.softmax(-1) @ v, found.logsumexp(-1)
