"""Context parallelism: the ranks of the axis `cp` share the positions of every row.

Every rank runs the whole model on its part of the positions; only attention looks beyond it. How it does (the method):

- `allgather`: keys and values of the whole row are gathered before each attention.
- `ring`: they travel from rank to rank instead, so that none ever holds all of them.
- `ulysses`: positions are exchanged for heads, so that each rank attends over the whole row with some of the heads.

A causal query sees what is before it, so the end of a row costs more than its beginning. Where a rank keeps its own
queries, a row is cut into twice as many chunks as there are ranks and rank i takes the i-th from either end.

Shape legend: B rows, S positions of a whole row, s = S / cp of this rank, d head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.dataset.batch import Batch, to_device
from fourfold.parallel.exchange import gather, swap
from fourfold.parallel.mesh import Mesh, is_ampere_or_later
from fourfold.parallel.ring_kernels import Piece

Method = Literal["allgather", "ulysses", "ring"]


@dataclass(frozen=True)
class ContextParallel:
    """One rank's place among those that share its rows.

    Attributes:
        group: the ranks of the axis `cp`.
        rank: this one's place in the group.
        size: ranks in the group.
        method: how attention looks beyond this rank's positions.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    method: Method

    @property
    def chunks(self) -> tuple[int, ...]:
        """This rank's chunks."""
        return self.chunks_of(self.rank)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Which of a row's `num_chunks` equal chunks a rank has, in the order in which they lie in its part."""
        return (rank,) if self.method == "ulysses" else (rank, 2 * self.size - 1 - rank)

    @property
    def num_chunks(self) -> int:
        """Chunks of a row; its length must be a multiple of it."""
        return self.size if self.method == "ulysses" else 2 * self.size

    def localize(self, batch: Batch) -> Batch:
        """This rank's positions of a micro-batch, with the documents of the whole rows noted.

        Counts (`num_tokens`, `lengths`) stay those of the whole. On the host, so that no device is waited for.
        """
        documents = batch.documents_of_rows()

        def part(tensor: Tensor) -> Tensor:
            chunks = tensor.chunk(self.num_chunks, dim=1)
            return torch.cat([chunks[number] for number in self.chunks], dim=1)

        return replace(
            batch,
            input_ids=part(batch.input_ids),
            targets=part(batch.targets),
            weights=part(batch.weights),
            numbers={name: part(values) for name, values in batch.numbers.items()},
            position_ids=part(batch.position_ids),
            document_ids=part(batch.document_ids),
            whole_rows=documents,
        )

    def gather(self, local: Tensor) -> Tensor:
        """Keys or values of the whole row from every rank's: [B, KV heads, s, d] -> [B, KV heads, S, d]."""
        by_rank = gather(local.permute(2, 0, 1, 3), 0, self.group)
        chunks = by_rank.chunk(self.num_chunks)
        held = [number for rank in range(self.size) for number in self.chunks_of(rank)]
        return torch.cat([chunks[held.index(number)] for number in range(self.num_chunks)]).permute(1, 2, 0, 3)

    def heads_for_positions(self, local: Tensor) -> Tensor:
        """This rank's heads of the whole row: [B, heads, s, d] -> [B, heads / cp, S, d]."""
        pieces = local.unflatten(1, (self.size, -1)).permute(1, 3, 0, 2, 4)  # [cp, s, B, heads / cp, d]
        return swap(pieces, self.group).flatten(0, 1).permute(1, 2, 0, 3)

    def positions_for_heads(self, whole: Tensor) -> Tensor:
        """The reverse: [B, heads / cp, S, d] -> [B, heads, s, d]."""
        pieces = whole.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4)  # [cp, heads / cp, B, s, d]
        return swap(pieces, self.group).flatten(0, 1).transpose(0, 1)


def share_positions(mesh: Mesh) -> ContextParallel:
    """This rank's place on the axis `cp`, which has more than one rank."""
    group = mesh.group(("cp",))
    assert group is not None
    return ContextParallel(group, mesh.index("cp"), mesh.layout.cp, mesh.layout.cp_method)


@dataclass(frozen=True)
class Stretch:
    """Adjacent queries, the same positions in every row, and the keys they see.

    Within a document the last query sees the last key, and every query before it one key less.

    Attributes:
        keys: for each row [start, stop) among the keys; what is outside is not seen.
        documents: for each row the numbers of queries and of keys of each document; they fill the stretch.
        offsets: the same numbers over all rows as offsets, two [D + 1] int32 on a CUDA device; None elsewhere.
    """

    keys: tuple[tuple[int, int], ...]
    documents: tuple[tuple[tuple[int, int], ...], ...]
    offsets: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(first: int, last: int, rows: tuple[tuple[int, ...], ...], device: torch.device) -> Stretch:
        """The queries [first, last) of rows that are made of documents of these lengths."""
        keys: list[tuple[int, int]] = []
        documents: list[tuple[tuple[int, int], ...]] = []
        for lengths in rows:
            edges = list(accumulate(lengths, initial=0))
            seen = [(max(a, first), min(b, last), a) for a, b in pairwise(edges) if a < last and b > first]
            keys.append((seen[0][2], last))
            documents.append(tuple((stop - start, stop - begin) for start, stop, begin in seen))
        offsets = _offsets(documents, device) if has_varlen(device) else None
        return Stretch(tuple(keys), tuple(documents), offsets)


def has_varlen(device: torch.device) -> bool:
    """Whether there is an attention kernel for documents of various lengths, which is told their offsets.

    It is flash attention, which Volta and Turing (V100, T4) do not have.
    """
    return device.type == "cuda" and is_ampere_or_later(device.index or 0)


def _offsets(documents: list[tuple[tuple[int, int], ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([(0, 0), *(pair for row in documents for pair in row)])
    queries, keys = sizes.cumsum(0).int().to(device).unbind(1)
    return queries.contiguous(), keys.contiguous()


class ContextRows:
    """What attention must know of the rows of which a rank has a part.

    No dataclass: FSDP's mixed precision would rebuild one, field by field, wherever it is handed to a module.

    Attributes:
        context: the rank's place.
        documents: for each row the lengths of its documents; what fills a row up is the last of them.
        device: of the tensors.
    """

    def __init__(self, context: ContextParallel, documents: tuple[tuple[int, ...], ...], device: torch.device) -> None:
        self.context, self.documents, self.device = context, documents, device
        self._pieces: dict[tuple[int, int | None], tuple[Piece, ...]] = {}
        self._reaches: dict[int | None, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """S."""
        return sum(self.documents[0])

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """One for each of this rank's chunks, over the keys of the whole row."""
        size = self.length // self.context.num_chunks
        return tuple(
            Stretch.of(number * size, (number + 1) * size, self.documents, self.device)
            for number in self.context.chunks
        )

    @cached_property
    def whole(self) -> Stretch:
        """Every position of the rows."""
        return Stretch.of(0, self.length, self.documents, self.device)

    @property
    def longest(self) -> int:
        """Length of the longest document."""
        return max(map(max, self.documents))

    def reach(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Who sees what, where there is one row (models/document_attention.py), as attention over the keys of all of
        it has it: this rank's queries, or with `ulysses` those of the row.

        Args:
            window: how many keys a query sees at most, itself among them; None for all.
        """
        if window not in self._reaches:
            [lengths] = self.documents
            own = key = torch.arange(self.length)
            if self.context.method != "ulysses":
                chunks = key.chunk(self.context.num_chunks)
                own = torch.cat([chunks[number] for number in self.context.chunks])
            ends = torch.tensor(lengths).cumsum(0)
            document = torch.searchsorted(ends, key, right=True)
            start, end = (ends - torch.tensor(lengths))[document], ends[document]
            first, last = start[own], end
            if window is not None:
                first, last = torch.maximum(first, own - window + 1), torch.minimum(end, key + window)
            of_keys = torch.stack([torch.searchsorted(own, key), torch.searchsorted(own, last)])
            made = (torch.stack([first, own]), of_keys)
            of_queries, of_keys = (to_device(each.int(), self.device) for each in made)
            self._reaches[window] = of_queries, of_keys
        return self._reaches[window]

    def pieces(self, source: int, window: int | None) -> tuple[Piece, ...]:
        """Which of this rank's queries see which keys of the rank `source` within a sliding window (None: any)."""
        if (source, window) not in self._pieces:
            found = (
                piece
                for row, lengths in enumerate(self.documents)
                for piece in self._pieces_of_row(row, lengths, source, window)
            )
            self._pieces[source, window] = tuple(found)
        return self._pieces[source, window]

    def _pieces_of_row(self, row: int, lengths: tuple[int, ...], source: int, window: int | None) -> Iterator[Piece]:
        size = self.length // self.context.num_chunks
        edges = list(accumulate(lengths, initial=0))
        for own, number in enumerate(self.context.chunks):
            first = number * size
            for other, theirs in enumerate(self.context.chunks_of(source)):
                start = theirs * size
                if theirs == number:
                    [stretch] = Stretch.of(first, first + size, (lengths,), self.device).documents
                    documents = tuple((queries, queries) for queries, _ in stretch)
                    yield self._piece(row, own * size, other * size, documents, 0)
                elif theirs < number:
                    # The one document that reaches from the end of those keys to the first of these queries, if any.
                    begin = max(edge for edge in edges if edge < start + size)
                    end = min(edge for edge in edges if edge > begin)
                    if window is None:
                        window = self.length
                    begin = max(begin, start, first - window + 1)
                    end = min(end, first + size, start + size + window - 1)
                    if end > first and begin < start + size:
                        documents = ((end - first, start + size - begin),)
                        yield self._piece(row, own * size, other * size + begin - start, documents, first - begin)

    def _piece(self, row: int, query: int, key: int, documents: tuple[tuple[int, int], ...], distance: int) -> Piece:
        queries, keys = (sum(numbers) for numbers in zip(*documents, strict=True))
        offsets = _offsets([documents], self.device) if self.device.type == "cuda" else None
        return Piece(row, (query, query + queries), (key, key + keys), documents, distance, offsets)
