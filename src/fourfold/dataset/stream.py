"""Samples made while training, for data that is too large to tokenise before: lazy, shuffled in a bounded buffer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from fourfold.base.errors import DataError
from fourfold.base.log import get_logger
from fourfold.dataset.batch import Sample
from fourfold.dataset.info import DatasetEntry
from fourfold.dataset.mix import MixStrategy, stream_numbers
from fourfold.dataset.outcome import LEFT_OUT
from fourfold.dataset.raw import HeldRows, Place, RawChunk
from fourfold.dataset.sources import OpenOptions, find_files, stream_source
from fourfold.dataset.storage import SampleColumns
from fourfold.dataset.tokenise import ChunkTokeniser

log = get_logger(__name__)

_EXAMINED_BYTES = 2**20
"""Of each end of a file, what tells it from another."""


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A raw row, the number of its data set and where it comes from."""

    raw: Any
    number: int
    place: Place


@dataclass(frozen=True)
class RowStream:
    """The rows of several data sets in the order of a mix, read as they are asked for.

    Attributes:
        entries: the data sets.
        options: how they are opened.
        strategy: how they are mixed; see mix.mix_order.
        probabilities: of each set when they are interleaved.
        seed: of the draws.
    """

    entries: Sequence[DatasetEntry]
    options: OpenOptions
    strategy: MixStrategy
    probabilities: Sequence[float]
    seed: int

    def __iter__(self) -> Iterator[StreamedRow]:
        if self.strategy == "concat" or len(self.entries) == 1:
            for number in range(len(self.entries)):
                yield from self._open(number)
            return
        streams = [self._open(number) for number in range(len(self.entries))]
        ended: set[int] = set()
        # A set that is never drawn must not be waited for.
        needed = {n for n in range(len(streams)) if not self.probabilities or self.probabilities[n] > 0}
        for number in stream_numbers(len(streams), self.probabilities, self.seed):
            if number in ended and self.strategy == "interleave_once":
                continue
            row = next(streams[number], None)
            if row is None:
                ended.add(number)
                if self.strategy == "interleave_under" or ended >= needed:
                    return
                if self.strategy == "interleave_once":
                    continue
                streams[number] = self._open(number)
                row = next(streams[number])
            yield row

    def digest(self) -> str:
        """Hash of what can be told of the local files without reading them: sizes, beginnings and ends."""
        digest = hashlib.sha256()
        for entry in self.entries:
            for file in find_files(entry) if entry.source == "file" else ():
                size = file.stat().st_size
                digest.update(size.to_bytes(8))
                with file.open("rb") as opened:
                    digest.update(opened.read(_EXAMINED_BYTES))
                    opened.seek(max(size - _EXAMINED_BYTES, 0))
                    digest.update(opened.read(_EXAMINED_BYTES))
        return digest.hexdigest()

    def _open(self, number: int) -> Iterator[StreamedRow]:
        for raw, file, index in stream_source(self.entries[number], self.options):
            yield StreamedRow(raw, number, (file, index))


def shuffled(rows: Iterator[StreamedRow], buffer_size: int, seed: Sequence[int]) -> Iterator[StreamedRow]:
    """The rows in random order, as far as a buffer of `buffer_size` rows reaches; keyed by `seed`."""
    random = np.random.Generator(np.random.PCG64(seed))
    buffer = list(islice(rows, buffer_size))
    for row in rows:
        at = int(random.integers(len(buffer)))
        yield buffer[at]
        buffer[at] = row
    yield from (buffer[at] for at in random.permutation(len(buffer)))


class SampleStream:
    """Samples of a stream of rows, without a length.

    Args:
        rows: what is streamed.
        tokeniser: turns them into samples.
        fingerprint: tells what is streamed apart; the files' contents are not part of it.
        chunk_rows: rows tokenised (and packed, and paired for KTO) at a time.
        buffer_size: rows to shuffle among; 0 to keep the order.
        seed: of the shuffling.
        held_out: rows at the start that are left out, since they are evaluated on.
    """

    def __init__(
        self,
        rows: RowStream,
        tokeniser: ChunkTokeniser,
        *,
        fingerprint: str,
        chunk_rows: int,
        buffer_size: int,
        seed: int,
        held_out: int = 0,
    ) -> None:
        self.fingerprint = fingerprint
        self._rows, self._tokeniser = rows, tokeniser
        self._chunk_rows, self._buffer_size, self._seed, self._held_out = chunk_rows, buffer_size, seed, held_out

    def digest(self) -> str:
        """Hash of what is streamed, as far as its files tell without being read."""
        return self._rows.digest()

    def __iter__(self) -> Iterator[Sample]:
        """The samples of the first epoch."""
        return self.epoch(0)

    def epoch(self, number: int) -> Iterator[Sample]:
        """The samples of an epoch, from 0; the order is keyed by (seed, epoch). `Sample.index` counts within it.

        Raises:
            DataError: a bad row, or no row can be trained.
        """
        rows = islice(iter(self._rows), self._held_out, None)
        if self._buffer_size:
            rows = shuffled(rows, self._buffer_size, [self._seed, number])
        index = 0
        told: set[str] = set()
        while chunk := list(islice(rows, self._chunk_rows)):
            result = self._tokeniser.run(as_chunk(chunk))
            for reason in result.complaints.keys() - told:
                told.add(reason)
                log.warning("First row dropped for %s: %s", reason, result.complaints[reason])
            for number in sorted(n for n, stats in result.stats.items() if stats.partial):
                name = self._tokeniser.entries[number].name
                if name not in told:
                    told.add(name)
                    log.warning(LEFT_OUT, name, "rows have")
            if result.batch.num_rows:
                columns = SampleColumns(result.batch, self._tokeniser.roles)
                for row in range(result.batch.num_rows):
                    yield columns.sample(row, index)
                    index += 1
        if index == 0:
            raise DataError("dataset: no row of the stream can be trained; see the warnings above for the reasons.")


def as_chunk(rows: Sequence[StreamedRow]) -> RawChunk:
    """Streamed rows as a chunk to tokenise."""
    return RawChunk([row.raw for row in rows], [row.number for row in rows], lambda at: rows[at].place)


def hold_out(rows: RowStream, number: int) -> HeldRows:
    """The first `number` rows of a stream, held in memory."""
    held = list(islice(iter(rows), number))
    return HeldRows(list(rows.entries), [r.raw for r in held], [r.number for r in held], [r.place for r in held])
