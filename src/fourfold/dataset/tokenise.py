"""One chunk of rows to one record batch: parsing, encoding, packing, and counting what became of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourfold.base import registry
from fourfold.base.errors import DataError
from fourfold.dataset.encode import ROLES, EncodedRow, Encoder
from fourfold.dataset.fields import show
from fourfold.dataset.formats.interface import BadRow, BrokenTurns, Parse
from fourfold.dataset.info import FORMATS_PACKAGE, DatasetEntry
from fourfold.dataset.rows import Row
from fourfold.dataset.sources import SourceRows
from fourfold.dataset.storage import SetStats, to_record_batch

NOTHING_TRAINED = "nothing to train"
BROKEN_TURNS = "broken turns"
BAD_ROW = "bad row"

PACKED_SET = -1


@dataclass(frozen=True, slots=True)
class RawChunk:
    """Some raw rows of several data sets, in order.

    Attributes:
        rows: the raw rows.
        sets: for each the number of its data set.
        places: for each its file and its number there.
    """

    rows: Sequence[Any]
    sets: Sequence[int]
    places: Sequence[tuple[str, int]]


@dataclass(slots=True)
class ChunkResult:
    """What a chunk became.

    Attributes:
        batch: its samples as columns.
        stats: counts for each data set, by its number.
        complaints: by reason the first row that was left out, with the reason in words.
    """

    batch: pa.RecordBatch
    stats: dict[int, SetStats] = field(default_factory=dict)
    complaints: dict[str, str] = field(default_factory=dict)

    def drop(self, number: int, reason: str, complaint: str) -> None:
        """Count a row that is left out."""
        self.stats.setdefault(number, SetStats()).drop(reason)
        self.complaints.setdefault(reason, complaint)


@dataclass(frozen=True)
class RowReaderOf:
    """Reads chunks of a mix of data sets. Can be sent to another process.

    Attributes:
        sources: the data sets.
        order: int64 [rows, 2]; number of the data set and row within it.
    """

    sources: Sequence[SourceRows]
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def read(self, start: int, stop: int) -> RawChunk:
        """Rows `start` to `stop` of the mix."""
        numbers, wanted = self.order[start:stop].T
        rows: list[Any] = [None] * len(wanted)
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            for place, raw in zip(at, self.sources[number].read(wanted[at]), strict=True):
                rows[place] = raw
        places = [self.sources[number].where(int(row)) for number, row in zip(numbers, wanted, strict=True)]
        return RawChunk(rows, [int(number) for number in numbers], places)


class ChunkTokeniser:
    """Turns chunks of raw rows into samples. Can be sent to another process.

    Args:
        entries: of the data sets, by number.
        skip_bad_rows: count rows that lack something instead of raising.
    """

    def __init__(self, encoder: Encoder, entries: Sequence[DatasetEntry], *, skip_bad_rows: bool) -> None:
        self.encoder, self.entries, self.skip_bad_rows = encoder, list(entries), skip_bad_rows

    def run(self, chunk: RawChunk) -> ChunkResult:
        """The samples of a chunk.

        Raises:
            DataError: a row lacks something or cannot be rendered, with its file and number.
        """
        settings = self.encoder.settings
        result = ChunkResult(pa.RecordBatch.from_pydict({}))
        kept, rows = self._parse(chunk, result)
        encoded = self._encode(rows, [chunk.places[at] for at in kept], result, [chunk.sets[at] for at in kept])
        packs = settings.packing and settings.kind in ("text", "chat")
        good: list[EncodedRow] = []
        for item in encoded:
            at = kept[item.row]
            stats = result.stats.setdefault(chunk.sets[at], SetStats())
            # The first token of a text is not trained, so a text of one token trains nothing; in a block it stays.
            if not item.trains and not (packs and settings.kind == "text"):
                result.drop(chunk.sets[at], NOTHING_TRAINED, _place(chunk.places[at]))
                continue
            stats.samples += 1
            stats.tokens += item.length
            stats.targets += sum(tokens.num_targets for tokens in item.sequences.values())
            stats.truncated += item.length < item.full_length
            good.append(item)
        samples = self.encoder.pack(good) if packs else good
        sets = [PACKED_SET if packs else chunk.sets[kept[item.row]] for item in samples]
        result.batch = to_record_batch(samples, sets, ROLES[settings.kind])
        return result

    def _parse(self, chunk: RawChunk, result: ChunkResult) -> tuple[list[int], list[Row]]:
        """The rows that are what their format demands, with their places in the chunk."""
        parsers: dict[int, Parse] = {}
        kept, rows = [], []
        for at, (raw, number) in enumerate(zip(chunk.rows, chunk.sets, strict=True)):
            if number not in parsers:
                parsers[number] = find_parser(self.entries[number].formatting)
            result.stats.setdefault(number, SetStats()).rows += 1
            try:
                if not isinstance(raw, Mapping):
                    raise BadRow(f"must be an object, not {show(raw)}")
                rows.append(parsers[number](raw, self.entries[number], self.encoder.settings.kind))
            except BrokenTurns as problem:
                result.drop(number, BROKEN_TURNS, f"{_place(chunk.places[at])}: {problem}")
            except BadRow as problem:
                self._complain(result, number, chunk.places[at], str(problem))
            else:
                kept.append(at)
        return kept, rows

    def _encode(
        self, rows: Sequence[Row], places: Sequence[tuple[str, int]], result: ChunkResult, sets: Sequence[int]
    ) -> list[EncodedRow]:
        """Encode all rows at once; if one cannot be rendered, find it and go on without it or raise."""
        try:
            return self.encoder.encode(rows)
        except DataError:
            pass
        good: list[int] = []
        for at, row in enumerate(rows):
            try:
                self.encoder.encode([row])
            except DataError as error:
                self._complain(result, sets[at], places[at], str(error))
            else:
                good.append(at)
        again = self.encoder.encode([rows[at] for at in good])
        return [EncodedRow(item.sequences, good[item.row], item.full_length, item.extras) for item in again]

    def _complain(self, result: ChunkResult, number: int, place: tuple[str, int], problem: str) -> None:
        if not self.skip_bad_rows:
            name = self.entries[number].name
            message = (
                f"{problem} (data set {name!r}). Correct the row, or leave such rows out with skip_bad_rows: true."
            )
            raise DataError(message, file=place[0], row=place[1])
        result.drop(number, BAD_ROW, f"{_place(place)}: {problem}")


def find_parser(formatting: str) -> Parse:
    """The `parse` function of a format."""
    parse: Callable[..., Row] = registry.load(FORMATS_PACKAGE, formatting, key="formatting").parse
    return parse


def _place(place: tuple[str, int]) -> str:
    return f"{place[0]}, row {place[1]}"
