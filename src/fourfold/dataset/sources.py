"""Opening data sets: from an entry of `dataset_info.json` to rows that can be read in any order, or streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.base.errors import DataError
from fourfold.base.log import get_logger
from fourfold.dataset.info import Columns, DatasetEntry, check_location
from fourfold.dataset.mix import sample_rows
from fourfold.dataset.placeholders import EXAMINED_ROWS, Filler, settle_filler
from fourfold.dataset.readers import FILE_KINDS, RowReader, open_file, stream_file

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What of the config bears on opening data sets.

    Attributes:
        variables: `dataset_vars`.
        max_samples: use at most this many rows of each data set.
        seed: of the choice of rows for `num_samples`.
        cache_dir: where hub data sets are stored; None for the library's default.
        token: for data sets of Hugging Face's hub that need one.
        ms_token: for those of ModelScope's.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    max_samples: int | None = None
    seed: int = 42
    cache_dir: str | None = None
    token: str | None = None
    ms_token: str | None = None

    def token_of(self, entry: DatasetEntry) -> str | None:
        """The token for the hub that a data set lies on."""
        return self.ms_token if entry.source == "ms_hub" else self.token


@dataclass(frozen=True, slots=True)
class SourcePart:
    """One file (or one hub data set) and the number of its first row within the data set."""

    label: str
    reader: RowReader
    first: int


@dataclass(frozen=True)
class SourceRows:
    """The raw rows of one data set, read when they are asked for. Can be sent to another process.

    Attributes:
        entry: its entry.
        parts: its files.
        digest: tells its contents apart.
        filler: fills its placeholders.
        chosen: int64; the rows that are used, in order; None for all.
    """

    entry: DatasetEntry
    parts: tuple[SourcePart, ...]
    digest: str
    filler: Filler
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        last = self.parts[-1]
        return last.first + len(last.reader)

    def read(self, rows: np.ndarray) -> list[Any]:
        """The raw rows with these numbers (int64), placeholders filled, in that order.

        Raises:
            DataError: a row is not valid JSON.
        """
        wanted = rows if self.chosen is None else self.chosen[rows]
        found: list[Any] = [None] * len(wanted)
        owners = np.searchsorted([part.first for part in self.parts], wanted, side="right") - 1
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            part = self.parts[owner]
            for place, raw in zip(places, part.reader.read(wanted[places] - part.first), strict=True):
                found[place] = self.filler.fill(raw)
        return found

    def where(self, row: int) -> tuple[str, int]:
        """The file of a row and its number there, for messages."""
        number = row if self.chosen is None else int(self.chosen[row])
        part = next(part for part in reversed(self.parts) if part.first <= number)
        return part.label, number - part.first


def open_source(entry: DatasetEntry, options: OpenOptions) -> SourceRows:
    """The rows of a data set.

    Raises:
        DataError: a missing or unreadable file, an empty data set, a column that its file does not have.
        ConfigError: placeholders that nothing fills.
    """
    if entry.source == "file":
        files = find_files(entry)
        readers = [(str(file), open_file(file)) for file in files]
        digest = _files_digest(files)
    else:
        from fourfold.dataset.hub import HubReader

        hub = HubReader.open(entry, cache_dir=options.cache_dir, token=options.token_of(entry))
        readers, digest = [(entry.location, hub)], hub.digest
    firsts = np.cumsum([0, *(len(reader) for _, reader in readers)])
    parts = tuple(
        SourcePart(label, reader, int(first)) for (label, reader), first in zip(readers, firsts, strict=False)
    )
    opened = SourceRows(entry, parts, digest, Filler({}), _chosen(entry, int(firsts[-1]), options))
    if len(opened) == 0:
        raise DataError(f"data set {entry.name!r} is empty. Add rows or leave it out.", file=parts[0].label)
    examined = opened.read(np.unique(np.linspace(0, len(opened) - 1, EXAMINED_ROWS).astype(np.int64)))
    check_columns(entry, examined, parts[0].label)
    return replace(opened, filler=settle_filler(entry, examined, options.variables))


def _chosen(entry: DatasetEntry, num_rows: int, options: OpenOptions) -> np.ndarray | None:
    if num_rows == 0:
        return None
    chosen = None if entry.num_samples is None else sample_rows(num_rows, entry.num_samples, options.seed)
    if options.max_samples is None or options.max_samples >= (num_rows if chosen is None else len(chosen)):
        return chosen
    return np.arange(options.max_samples) if chosen is None else chosen[: options.max_samples]


def find_files(entry: DatasetEntry) -> list[Path]:
    """The files of an entry: the file it names, or those of the folder it names, sorted.

    Raises:
        DataError: there is no such file or folder, or no file in the folder that can be read.
    """
    check_location(entry)
    path = Path(entry.location)
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lstrip(".").lower() in FILE_KINDS)
    if not files:
        raise DataError(f"the folder holds no file of kind {', '.join(FILE_KINDS)}.", file=str(path))
    return files


def _files_digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def check_columns(entry: DatasetEntry, rows: Sequence[Any], label: str) -> None:
    """Refuse columns that an entry names and none of these rows has.

    Raises:
        DataError: names the columns that the file has.
    """
    if not entry.has_columns:
        return
    present = {key for row in rows if isinstance(row, Mapping) for key in row}
    for name in Columns.__dataclass_fields__:
        column = getattr(entry.columns, name)
        if column is not None and column not in present:
            raise DataError(
                f"columns: data set {entry.name!r} says that {name} is in column {column!r}, which is not there. "
                f"Use one of: {', '.join(sorted(map(str, present)))}.",
                file=label,
            )


def stream_source(entry: DatasetEntry, options: OpenOptions) -> Iterator[tuple[Any, str, int]]:
    """The raw rows of a data set one after the other, placeholders filled, each with its file and number there.

    Raises:
        DataError, ConfigError: as `open_source`, for what the first rows tell.
    """
    if entry.num_samples is not None:
        log.warning("dataset %s: num_samples needs all rows at hand; it is not applied while streaming.", entry.name)
    rows = _stream_parts(entry, options)
    head: list[tuple[Any, str, int]] = []
    for row in rows:
        head.append(row)
        if len(head) == EXAMINED_ROWS:
            break
    if not head:
        raise DataError(f"data set {entry.name!r} is empty. Add rows or leave it out.", file=entry.location)
    raw_rows = [raw for raw, _, _ in head]
    check_columns(entry, raw_rows, head[0][1])
    filler = settle_filler(entry, raw_rows, options.variables)
    limit = options.max_samples
    number = 0
    for source in (head, rows):
        for raw, label, index in source:
            if limit is not None and number >= limit:
                return
            yield filler.fill(raw), label, index
            number += 1


def _stream_parts(entry: DatasetEntry, options: OpenOptions) -> Iterator[tuple[Any, str, int]]:
    if entry.source == "file":
        for file in find_files(entry):
            for index, raw in enumerate(stream_file(file)):
                yield raw, str(file), index
        return
    from fourfold.dataset.hub import stream_hub

    for index, raw in enumerate(stream_hub(entry, cache_dir=options.cache_dir, token=options.token_of(entry))):
        yield raw, entry.location, index
