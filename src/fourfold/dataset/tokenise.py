"""One chunk of rows to one record batch: parsing, encoding, packing, and counting what became of the rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa

from fourfold.base import registry
from fourfold.base.errors import DataError
from fourfold.dataset.columns import to_record_batch
from fourfold.dataset.encode import Encoder
from fourfold.dataset.encoded import ROLES, EncodedRow
from fourfold.dataset.fields import show
from fourfold.dataset.formats.interface import BadRow, BrokenTurns, Parse, PromptsDiffer
from fourfold.dataset.info import FORMATS_PACKAGE, DatasetEntry
from fourfold.dataset.raw import Place, RawChunk
from fourfold.dataset.rows import Row
from fourfold.dataset.set_stats import SetStats

NOTHING_TRAINED = "nothing to train"
BROKEN_TURNS = "broken turns"
PROMPTS_DIFFER = "chosen and rejected answer different prompts"
SAME_ANSWERS = "chosen and rejected are the same"
BAD_ROW = "bad row"

PACKED_SET = -1


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

    def of_set(self, number: int) -> SetStats:
        """The counts of a data set."""
        if number not in self.stats:
            self.stats[number] = SetStats()
        return self.stats[number]

    def drop(self, number: int, reason: str, complaint: str) -> None:
        """Count a row that is left out."""
        self.of_set(number).drop(reason)
        self.complaints.setdefault(reason, complaint)


class ChunkTokeniser:
    """Turns chunks of raw rows into samples. Can be sent to another process.

    Args:
        entries: of the data sets, by number.
        skip_bad_rows: count rows that lack something instead of raising.
    """

    def __init__(self, encoder: Encoder, entries: Sequence[DatasetEntry], *, skip_bad_rows: bool) -> None:
        self.encoder, self.entries, self.skip_bad_rows = encoder, list(entries), skip_bad_rows

    @property
    def roles(self) -> tuple[str, ...]:
        """The sequences of each sample."""
        return ROLES[self.encoder.settings.kind]

    def run(self, chunk: RawChunk) -> ChunkResult:
        """The samples of a chunk.

        Raises:
            DataError: a row lacks something or cannot be rendered, with its file and number.
        """
        with _collection_paused():
            return self._run(chunk)

    def _run(self, chunk: RawChunk) -> ChunkResult:
        result = ChunkResult(pa.RecordBatch.from_pydict({}))
        kept, rows = self._parse(chunk, result)
        encoded = self._encode(kept, rows, chunk, result)
        good = [
            item
            for at, item in zip(kept_of(encoded, kept), encoded, strict=True)
            if self._count(chunk, at, item, result)
        ]
        packing = self.encoder.settings.packing
        samples = self.encoder.pack(good) if packing else good
        sets = [PACKED_SET if packing else chunk.sets[at] for at in kept_of(samples, kept)]
        result.batch = to_record_batch(samples, sets, self.roles)
        return result

    def _parse(self, chunk: RawChunk, result: ChunkResult) -> tuple[list[int], list[Row]]:
        """The rows that are what their format demands, and their places in the chunk."""
        parsers = {number: find_parser(self.entries[number].formatting) for number in set(chunk.sets)}
        kept, rows = [], []
        for at, (raw, number) in enumerate(zip(chunk.rows, chunk.sets, strict=True)):
            result.of_set(number).rows += 1
            try:
                if not isinstance(raw, Mapping):
                    raise BadRow(f"must be an object, not {show(raw)}")
                rows.append(parsers[number](raw, self.entries[number], self.encoder.settings.kind))
            except BrokenTurns as problem:
                result.drop(number, BROKEN_TURNS, f"{_told(chunk.place(at))}: {problem}")
            except PromptsDiffer as problem:
                result.drop(number, PROMPTS_DIFFER, f"{_told(chunk.place(at))}: {problem}")
            except BadRow as problem:
                self._complain(result, number, chunk.place(at), str(problem))
            else:
                kept.append(at)
                result.of_set(number).partial += rows[-1].leaves_out
        return kept, rows

    def _encode(self, kept: list[int], rows: Sequence[Row], chunk: RawChunk, result: ChunkResult) -> list[EncodedRow]:
        """Encode all rows at once. If one cannot be rendered, find it, and raise or go on without it.

        `kept` loses the rows that are left out.
        """
        try:
            return self.encoder.encode(rows)
        except DataError:
            pass
        good: list[int] = []
        for number, row in enumerate(rows):
            try:
                self.encoder.encode([row])
            except DataError as error:
                at = kept[number]
                self._complain(result, chunk.sets[at], chunk.place(at), str(error))
            else:
                good.append(number)
        kept[:] = [kept[number] for number in good]
        return self.encoder.encode([rows[number] for number in good])

    def _count(self, chunk: RawChunk, at: int, item: EncodedRow, result: ChunkResult) -> bool:
        """Count a row; returns whether it can be trained."""
        settings, number = self.encoder.settings, chunk.sets[at]
        # The first token of a text is not trained, so a text of one token trains nothing; within a block it may stay.
        if not item.trains and not (settings.packing and settings.kind == "text"):
            result.drop(number, NOTHING_TRAINED, _told(chunk.place(at)))
            return False
        if settings.kind == "preference" and _same_answers(item):
            result.drop(number, SAME_ANSWERS, _told(chunk.place(at)))
            return False
        stats = result.of_set(number)
        stats.samples += 1
        stats.tokens += item.length
        stats.targets += item.num_targets
        stats.truncated += item.length < item.full_length
        return True

    def _complain(self, result: ChunkResult, number: int, place: Place, problem: str) -> None:
        if not self.skip_bad_rows:
            name = self.entries[number].name
            message = (
                f"{problem.removesuffix('.')} (data set {name!r}). "
                "Correct the row, or leave such rows out with `skip_bad_rows: true`."
            )
            raise DataError(message, file=place[0], row=place[1])
        result.drop(number, BAD_ROW, f"{_told(place)}: {problem}")


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Keep Python from looking for garbage among a chunk's many objects, which are in use; it takes a third of the time
    otherwise."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _same_answers(item: EncodedRow) -> bool:
    """Whether nothing tells the answers of a pair apart, as they are trained."""
    chosen, rejected = item.sequences.values()
    return chosen.ids == rejected.ids


def kept_of(items: Sequence[EncodedRow], kept: Sequence[int]) -> list[int]:
    """The places in the chunk of encoded rows, given those of the rows that were encoded."""
    return [kept[item.row] for item in items]


def find_parser(formatting: str) -> Parse:
    """The `parse` function of a format."""
    parse: Callable[..., Row] = registry.load(FORMATS_PACKAGE, formatting, key="formatting").parse
    return parse


def _told(place: Place) -> str:
    return f"{place[0]}, row {place[1] + 1}"  # people count from 1
