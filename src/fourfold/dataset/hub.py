"""Data sets of Hugging Face's hub and of ModelScope's, through the `datasets` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from fourfold.base.errors import DataError
from fourfold.base.modelscope import load_data_set
from fourfold.dataset.info import DatasetEntry

_FAILURES = (DatasetNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, FileNotFoundError, ValueError)


class HubReader:
    """The rows of one split; `datasets` keeps them in memory-mapped Arrow files of its own cache."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._dataset = dataset

    @classmethod
    def open(cls, entry: DatasetEntry, *, cache_dir: str | None, token: str | None) -> HubReader:
        """Load a split, from the hub or the local cache.

        Raises:
            DataError: it cannot be loaded.
        """
        loaded = _load(entry, cache_dir=cache_dir, token=token, streaming=False)
        assert isinstance(loaded, datasets.Dataset)
        return cls(loaded)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, rows: Sequence[int]) -> list[Any]:
        """See readers.RowReader."""
        columns = self._dataset[np.asarray(rows, dtype=np.int64)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @property
    def digest(self) -> str:
        """Hash of the Arrow files or of the memory that holds the rows."""
        digest = hashlib.sha256(str(self._dataset.split).encode())
        for file in self._dataset.cache_files:
            with Path(file["filename"]).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        if not self._dataset.cache_files:  # held in memory
            for batch in self._dataset.data.table.to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()


def stream_hub(entry: DatasetEntry, *, cache_dir: str | None, token: str | None) -> Iterator[Any]:
    """The rows of a split as they arrive.

    Raises:
        DataError: it cannot be loaded.
    """
    yield from _load(entry, cache_dir=cache_dir, token=token, streaming=True)


def _load(
    entry: DatasetEntry, *, cache_dir: str | None, token: str | None, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    if entry.source == "ms_hub":
        return load_data_set(
            entry.location,
            subset=entry.subset,
            folder=entry.folder,
            split=entry.split,
            cache_dir=cache_dir,
            token=token,
            streaming=streaming,
        )
    try:
        return datasets.load_dataset(  # pyright: ignore[reportReturnType] - a split is named, so it is no dict
            path=entry.location,
            name=entry.subset,
            data_dir=entry.folder,
            split=entry.split,
            cache_dir=cache_dir,
            token=token,
            streaming=streaming,
        )
    except _FAILURES as error:
        raise DataError(
            f"data set {entry.name!r} cannot be loaded from the hub ({str(error).rstrip('.')}). Check hf_hub_url, "
            "subset and split; name a mirror that can be reached in HF_ENDPOINT; or download it and name it with "
            "file_name.",
            file=entry.location,
        ) from error
