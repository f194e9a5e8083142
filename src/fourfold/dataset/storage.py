"""Tokenised samples on disk: Arrow columns, memory-mapped, one record batch for each chunk of rows. See columns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from fourfold.base.errors import DataError
from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.columns import EXTRAS, TOKEN_COLUMNS, column_name
from fourfold.dataset.set_stats import SetStats

DATA_FILE, META_FILE = "samples.arrow", "meta.json"
STORAGE_VERSION = 1


class SampleWriter:
    """Writes the record batches of a data set, and what is known about it, into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / DATA_FILE).open("wb")
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self.num_samples = 0

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None and kind is None:
            self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add samples; nothing is written for an empty batch."""
        if batch.num_rows == 0:
            return
        if self._writer is None:
            self._writer = pyarrow.ipc.new_file(self._file, batch.schema)
        self._writer.write_batch(batch)
        self.num_samples += batch.num_rows

    def write_meta(self, fingerprint: str, roles: Sequence[str], stats: Mapping[str, SetStats], facts: Any) -> None:
        """Write the folder's description; call it last."""
        meta = {
            "storage_version": STORAGE_VERSION,
            "fingerprint": fingerprint,
            "roles": list(roles),
            "num_samples": self.num_samples,
            "stats": {name: asdict(entry) for name, entry in stats.items()},
            "facts": facts,
        }
        with (self._folder / META_FILE).open("w", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())


class SampleColumns:
    """The samples of one record batch, as numpy views of its columns."""

    def __init__(self, batch: pa.RecordBatch, roles: Sequence[str]) -> None:
        self._lists = {
            role: [_views(batch.column(column_name(role, name))) for name in TOKEN_COLUMNS] for role in roles
        }
        self._extras = {
            name.removeprefix(EXTRAS): batch.column(name).to_numpy()
            for name in batch.schema.names
            if name.startswith(EXTRAS)
        }

    def sample(self, row: int, index: int) -> Sample:
        """The sample in a row of the record batch; `index` is its position in the whole data set."""
        sequences = {}
        for role, columns in self._lists.items():
            ids, spans, overrides, documents = (
                values[offsets[row] : offsets[row + 1]].tolist() for values, offsets in columns
            )
            if ids:
                sequences[role] = Example(ids, expand_labels(ids, spans, overrides), tuple(documents))
        return Sample(sequences, index, {name: float(values[row]) for name, values in self._extras.items()})


def _views(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(column, pa.ListArray)
    return column.values.to_numpy(), column.offsets.to_numpy()


def expand_labels(ids: Sequence[int], spans: Sequence[int], overrides: Sequence[int]) -> list[int]:
    """Labels in full: IGNORE_INDEX outside the spans, but for the overrides."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        labels[start:stop] = ids[start:stop]
    for position, label in zip(overrides[::2], overrides[1::2], strict=True):
        labels[position] = label
    return labels


class TokenisedDataset:
    """Tokenised samples of a folder, with random access; nothing is read before it is asked for.

    Attributes:
        folder: where the samples lie.
        fingerprint: tells the data apart: its rows, tokenizer, template, options and the code that made it.
        stats: what became of the rows, by name of the data set.
        facts: what the data was made with, for messages.
    Raises:
        DataError: the folder is damaged or was written by a newer version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            if meta["storage_version"] != STORAGE_VERSION:
                raise DataError(
                    f"holds data of storage version {meta['storage_version']}, not {STORAGE_VERSION}. Tokenise again.",
                    file=str(folder),
                )
            self._reader = pyarrow.ipc.open_file(pa.memory_map(str(folder / DATA_FILE)))
        except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
            raise DataError(f"is not tokenised data or is damaged ({error}). Remove it.", file=str(folder)) from error
        self.fingerprint: str = meta["fingerprint"]
        self.stats = {name: SetStats(**entry) for name, entry in meta["stats"].items()}
        self.facts: dict[str, Any] = meta["facts"]
        self._roles: list[str] = meta["roles"]
        self._num_samples: int = meta["num_samples"]
        self._chunks: dict[int, SampleColumns] = {}
        self._added: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[type[TokenisedDataset], tuple[Path]]:
        return TokenisedDataset, (self.folder,)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._chunks[number] = SampleColumns(self._reader.get_batch(number), self._roles)
        sample = chunk.sample(index - int(self._starts[number]), index)
        if not self._added:
            return sample
        return replace(sample, extras={**sample.extras, **{n: float(v[index]) for n, v in self._added.items()}})

    def add_numbers(self, name: str, values: np.ndarray) -> None:
        """Give every sample a number more (`Sample.extras`), in memory only.

        Args:
            values: [samples].
        """
        if len(values) != self._num_samples:
            raise ValueError(f"{len(values)} numbers for {self._num_samples} samples")
        self._added[name] = values

    @cached_property
    def _starts(self) -> np.ndarray:
        """int64 [record batches]: the first sample of each record batch."""
        sizes = [self._reader.get_batch(number).num_rows for number in range(self._reader.num_record_batches)]
        return np.cumsum([0, *sizes[:-1]])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [samples]: tokens of each sample, all roles together."""
        return self._numbers("length")

    @cached_property
    def num_targets(self) -> np.ndarray:
        """int32 [samples]: trained positions of each sample, all roles together."""
        return self._numbers("targets")

    @cached_property
    def sets(self) -> np.ndarray:
        """int16 [samples]: which data set (in the order of `stats`) a sample comes from; -1 for a pack."""
        return self._numbers("set")

    def _numbers(self, column: str) -> np.ndarray:
        batches = (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
        return np.concatenate([batch.column(column).to_numpy() for batch in batches])

    def digest(self) -> str:
        """Hash of all samples, whatever they were made of; reads every token."""
        digest = hashlib.sha256()
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            for role in self._roles:
                for name in TOKEN_COLUMNS:
                    values, offsets = _views(batch.column(column_name(role, name)))
                    digest.update(np.diff(offsets).tobytes())
                    digest.update(values.tobytes())
            for name in batch.schema.names:
                if name.startswith(EXTRAS):
                    digest.update(batch.column(name).to_numpy().tobytes())
        return digest.hexdigest()

    def document_lengths(self) -> np.ndarray:
        """int32: length of every document of every sequence, packed or not."""
        found: list[np.ndarray] = []
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            for role in self._roles:
                documents, starts = _views(batch.column(column_name(role, "documents")))
                _, offsets = _views(batch.column(column_name(role, "input_ids")))
                single = np.diff(starts) == 0
                found += (np.diff(offsets)[single], documents)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int32)
