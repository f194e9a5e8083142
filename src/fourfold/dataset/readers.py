"""Files of rows: random access and streaming, without holding a file in memory where its kind allows it.

A reader holds a path and offsets only, so it can be sent to another process; files are opened where they are read.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from fourfold.base.errors import DataError
from fourfold.dataset.json_scan import scan_rows

_STREAM_ROWS = 1000
_SCANNED_BYTES = 1 << 24
"""Bytes of a file of lines that are looked through at a time."""


class RowReader(Protocol):
    """The rows of one file."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[Any]:
        """The rows with these numbers, in that order; each is what the file holds, normally a dict."""
        ...


class JsonReader:
    """A JSON or JSON-lines file: byte offsets of its rows, which are parsed when they are asked for."""

    def __init__(self, path: Path, spans: np.ndarray) -> None:
        """Args:
        spans: int64 [rows, 2]; where each row starts and stops, in bytes.
        """
        self._path, self._spans = path, spans
        self._map: mmap.mmap | None = None

    @classmethod
    def open(cls, path: Path) -> JsonReader:
        """Find the rows of a `.json` file: an array of rows, or rows one after the other."""
        spans = np.fromiter((n for _, *span in scan_rows(path) for n in span), dtype=np.int64)
        return cls(path, spans.reshape(-1, 2))

    @classmethod
    def open_lines(cls, path: Path) -> JsonReader:
        """Find the rows of a `.jsonl` file: its lines that are not blank."""
        return cls(path, _line_spans(path))

    def __len__(self) -> int:
        return len(self._spans)

    def __getstate__(self) -> tuple[Path, np.ndarray]:
        return self._path, self._spans

    def __setstate__(self, state: tuple[Path, np.ndarray]) -> None:
        self.__init__(*state)

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with self._path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def read(self, rows: Sequence[int]) -> list[Any]:
        """See RowReader."""
        data = self._bytes()
        found = [self._parse(data, *span) for span in self._spans[np.asarray(rows, dtype=int)].tolist()]
        if sys.platform == "linux":
            data.madvise(mmap.MADV_DONTNEED)  # else all that was ever read counts as memory of this process
        return found

    def _parse(self, data: mmap.mmap, start: int, stop: int) -> Any:
        try:
            return json.loads(data[start:stop].decode("utf-8"))
        except json.JSONDecodeError as error:
            line = data[:start].count(b"\n") + error.lineno
            raise DataError(
                f"bad JSON in line {line}: {error.msg}. Correct this line.", file=str(self._path)
            ) from error
        except UnicodeDecodeError as error:
            line = data[:start].count(b"\n") + 1
            raise DataError(
                f"line {line} is not UTF-8 text ({error.reason}). Save the file as UTF-8.", file=str(self._path)
            ) from error


def _line_spans(path: Path) -> np.ndarray:
    """int64 [lines, 2]: where the lines that are not blank start and stop, in bytes."""
    size = path.stat().st_size
    if size == 0:
        return np.empty((0, 2), dtype=np.int64)
    with path.open("rb") as file:
        breaks = [
            np.flatnonzero(np.frombuffer(file.read(_SCANNED_BYTES), dtype=np.uint8) == ord("\n")) + at
            for at in range(0, size, _SCANNED_BYTES)
        ]
        ends = np.concatenate([*breaks, [size]])
        starts = np.concatenate([[0], ends[:-1] + 1])
        file.seek(0)
        if file.read(3) == b"\xef\xbb\xbf":
            starts[0] = 3
        spans = np.stack([starts, ends], axis=1)
        spans = spans[spans[:, 0] < spans[:, 1]]
        short = np.flatnonzero(spans[:, 1] - spans[:, 0] <= 2)  # "\r", or a few blanks
        blank = [i for i in short.tolist() if not _read_span(file, *spans[i].tolist()).strip()]
    return np.delete(spans, blank, axis=0)


def _read_span(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


class TextReader:
    """A plain text file: each line is a row with the one column `text`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 text ({error.reason}). Save the file as UTF-8.", file=str(path)) from error
        if self._lines[-1] == "":
            self._lines.pop()

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, rows: Sequence[int]) -> list[Any]:
        """See RowReader."""
        return [{"text": self._lines[row].removesuffix("\r")} for row in rows]


class TableReader:
    """An Arrow table: memory-mapped for `.arrow`, read whole for `.csv`."""

    def __init__(self, path: Path, load: Callable[[Path], pa.Table]) -> None:
        self._path, self._load = path, load
        self._table = load(path)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getstate__(self) -> tuple[Path, Callable[[Path], pa.Table]]:
        return self._path, self._load

    def __setstate__(self, state: tuple[Path, Callable[[Path], pa.Table]]) -> None:
        self.__init__(*state)

    def read(self, rows: Sequence[int]) -> list[Any]:
        """See RowReader."""
        return _table_rows(self._table, np.asarray(rows, dtype=np.int64))


class ParquetReader:
    """A Parquet file: one row group in memory at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        meta = self._file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._group, self._table = -1, pa.table({})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> Path:
        return self._path

    def __setstate__(self, state: Path) -> None:
        self.__init__(state)

    def read(self, rows: Sequence[int]) -> list[Any]:
        """See RowReader."""
        wanted = np.asarray(rows, dtype=np.int64)
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        found: list[Any] = [None] * len(wanted)
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            if group != self._group:
                self._group, self._table = int(group), self._file.read_row_group(int(group))
            for place, row in zip(places, _table_rows(self._table, wanted[places] - self._starts[group]), strict=True):
                found[place] = row
        return found


def _table_rows(table: pa.Table, rows: np.ndarray) -> list[Any]:
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return table.slice(int(rows[0]), len(rows)).to_pylist()
    return table.take(pa.array(rows)).to_pylist()


def _load_arrow(path: Path) -> pa.Table:
    source = pa.memory_map(str(path))
    try:
        return pyarrow.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:  # `datasets` writes the stream form
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()


def _load_csv(path: Path) -> pa.Table:
    """All columns as text: a number in a column of answers is an answer too."""
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as head:
        columns = {name: pa.string() for name in head.schema.names}
    convert = pyarrow.csv.ConvertOptions(column_types=columns, strings_can_be_null=False)
    return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)


_READERS: dict[str, Callable[[Path], RowReader]] = {
    "json": JsonReader.open,
    "jsonl": JsonReader.open_lines,
    "txt": TextReader,
    "csv": lambda path: TableReader(path, _load_csv),
    "arrow": lambda path: TableReader(path, _load_arrow),
    "parquet": ParquetReader,
}

FILE_KINDS = tuple(_READERS)
"""Extensions of the files that can be read."""


def open_file(path: Path) -> RowReader:
    """The reader of a file, chosen by its extension.

    Raises:
        DataError: an extension that is not known, or a file that is not what its extension says.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in _READERS:
        raise DataError(
            f"files of kind {path.suffix!r} are not read. Use one of: {', '.join(FILE_KINDS)}.", file=str(path)
        )
    try:
        return _READERS[kind](path)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"is not a valid {kind} file ({str(error).strip()}). Correct or replace it.", file=str(path)
        ) from error


def stream_file(path: Path) -> Iterator[Any]:
    """The rows of a file in order, starting at once where its kind allows it."""
    if path.suffix == ".json":
        return (row for row, _, _ in scan_rows(path))
    if path.suffix == ".jsonl":
        return _stream_lines(path)
    return _stream_reader(open_file(path))


def _stream_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"bad JSON in line {number}: {error.msg}. Correct this line.", file=str(path)
                    ) from error


def _stream_reader(reader: RowReader) -> Iterator[Any]:
    for start in range(0, len(reader), _STREAM_ROWS):
        yield from reader.read(range(start, min(start + _STREAM_ROWS, len(reader))))
