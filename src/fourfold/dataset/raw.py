"""Raw rows of several data sets in the order in which they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fourfold.dataset.info import DatasetEntry
from fourfold.dataset.sources import SourceRows

Place = tuple[str, int]
"""A file and the number of a row in it, from 0."""


@dataclass(frozen=True, slots=True)
class RawChunk:
    """Some raw rows.

    Attributes:
        rows: what the files hold, with placeholders filled.
        sets: for each the number of its data set.
        place: tells where a row of the chunk comes from, for messages.
    """

    rows: Sequence[Any]
    sets: Sequence[int]
    place: Callable[[int], Place]


class RawRows(Protocol):
    """Rows that can be read chunk by chunk. Can be sent to another process."""

    @property
    def entries(self) -> list[DatasetEntry]:
        """The data sets, by number."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> RawChunk:
        """Rows `start` to `stop`."""
        ...

    def facts(self) -> dict[str, Any]:
        """JSON values that tell these rows and their order apart from others."""
        ...


@dataclass(frozen=True)
class RawMix:
    """A mix of data sets.

    Attributes:
        sources: the data sets.
        order: int64 [rows, 2]; number of the data set and row within it.
    """

    sources: Sequence[SourceRows]
    order: np.ndarray

    @property
    def entries(self) -> list[DatasetEntry]:
        """See RawRows."""
        return [source.entry for source in self.sources]

    def __len__(self) -> int:
        return len(self.order)

    def read(self, start: int, stop: int) -> RawChunk:
        """See RawRows."""
        numbers, wanted = self.order[start:stop].T
        rows: list[Any] = [None] * len(wanted)
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            for place, raw in zip(at, self.sources[number].read(wanted[at]), strict=True):
                rows[place] = raw
        return RawChunk(rows, numbers.tolist(), lambda at: self.sources[numbers[at]].where(int(wanted[at])))

    def facts(self) -> dict[str, Any]:
        """See RawRows."""
        order = hashlib.sha256(self.order.tobytes())
        for source in self.sources:
            order.update(b"all" if source.chosen is None else source.chosen.tobytes())
        sets = [[repr(source.entry), source.digest, dict(source.filler.values)] for source in self.sources]
        return {"sets": sets, "order": order.hexdigest()}


@dataclass(frozen=True)
class HeldRows:
    """Rows held in memory: the few that are set aside from a stream.

    Attributes:
        entries: the data sets, by number.
        rows: the raw rows.
        sets: for each the number of its data set.
        places: for each where it comes from.
    """

    entries: list[DatasetEntry]
    rows: Sequence[Any]
    sets: Sequence[int]
    places: Sequence[Place]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> RawChunk:
        """See RawRows."""
        return RawChunk(self.rows[start:stop], self.sets[start:stop], lambda at: self.places[start + at])

    def facts(self) -> dict[str, Any]:
        """See RawRows."""
        text = json.dumps([list(self.rows), list(self.sets)], sort_keys=True, default=str)
        return {
            "sets": [repr(entry) for entry in self.entries],
            "order": hashlib.sha256(text.encode()).hexdigest(),
        }
