"""Token sequences as encoding makes them and storage keeps them: labels in compact form."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

from fourfold.dataset.formats.interface import RowKind

ROLES: Mapping[RowKind, tuple[str, ...]] = {
    "text": ("",),
    "chat": ("",),
    "preference": ("chosen", "rejected"),
    "kto": ("response", "kl"),
    "prompt": ("prompt", "reference"),
}
"""The sequences of a sample, by what the stage trains on."""

_UNTRAINED = ("kl", "reference")
"""Sequences that need not have anything to train."""


TokenIds: TypeAlias = "array[int]"
"""Token ids as 4-byte integers, `array("i")`: cut, joined and stored without a step for each of them."""


def token_ids(ids: Iterable[int] = ()) -> TokenIds:
    """Some token ids."""
    return array("i", ids)


@dataclass(slots=True)
class Tokens:
    """A token sequence with its labels in compact form.

    Attributes:
        ids: token ids.
        spans: start, stop, start, stop, ... of the stretches whose labels are the tokens themselves.
        overrides: position, label, position, label, ... where a label is not the token itself.
        documents: lengths of the documents; empty for a single one.
    """

    ids: TokenIds = field(default_factory=token_ids)
    spans: list[int] = field(default_factory=list)
    overrides: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    def append(self, ids: TokenIds, *, trained: bool, first_label: int | None = None) -> None:
        """Add tokens at the end.

        Args:
            first_label: label of the first of them, if it is another token.
        """
        start = len(self.ids)
        self.ids += ids
        if not ids:
            return
        if first_label is not None:
            self.overrides += (start, first_label)
            start += 1
        if trained and start < len(self.ids):
            if self.spans and self.spans[-1] == start:
                self.spans[-1] = len(self.ids)
            else:
                self.spans += (start, len(self.ids))

    @property
    def num_targets(self) -> int:
        """Trained positions; the first of a document predicts nothing before it."""
        trained = sum(self.spans[1::2]) - sum(self.spans[::2]) + len(self.overrides) // 2
        return trained - sum(map(self._is_trained, accumulate(self.documents[:-1], initial=0)))

    def _is_trained(self, position: int) -> bool:
        # An odd number of span edges at or before a position means that it lies within a span.
        return bisect.bisect_right(self.spans, position) % 2 == 1 or position in self.overrides[::2]


@dataclass(slots=True)
class EncodedRow:
    """What one row became.

    Attributes:
        sequences: by role, as in `Sample`.
        row: the row's number in the chunk.
        full_length: tokens before anything was cut.
        extras: numbers of the sample.
        length: tokens of all roles.
        num_targets: trained positions of all roles.
        trains: whether there is something to train in every sequence that is trained (a prompt: whether there is one).
    """

    sequences: Mapping[str, Tokens]
    row: int
    full_length: int
    extras: Mapping[str, float] = field(default_factory=dict)
    length: int = field(init=False)
    num_targets: int = field(init=False)
    trains: bool = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.num_targets = 0
        self.trains = True
        for role, tokens in self.sequences.items():
            targets = tokens.num_targets
            self.length += len(tokens.ids)
            self.num_targets += targets
            if role == "prompt":
                self.trains = self.trains and bool(tokens.ids)
            elif role not in _UNTRAINED:
                self.trains = self.trains and targets > 0
