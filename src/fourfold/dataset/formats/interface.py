"""What a data format is: one function that turns a raw row into a `Row`. The file name is the value of `formatting`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from fourfold.dataset.info import DatasetEntry
from fourfold.dataset.rows import Row

RowKind = Literal["text", "chat", "preference", "kto", "prompt"]
"""What a stage trains on: plain text, answered conversations, pairs of answers, tagged answers, prompts."""

RawRow = Mapping[str, Any]


class BadRow(Exception):  # noqa: N818 - not an error yet: the reader adds file and row, or counts it
    """A row that lacks something or holds a wrong type; an error unless `skip_bad_rows` is given."""


class BrokenTurns(BadRow):
    """A conversation whose roles do not alternate or that has nothing to answer; dropped and counted."""


class PromptsDiffer(BadRow):
    """A pair whose answers are to different prompts; dropped and counted."""


class Parse(Protocol):
    """The `parse` function of each file of this folder."""

    def __call__(self, raw: RawRow, entry: DatasetEntry, kind: RowKind) -> Row:
        """The row that `raw` holds, for a stage that trains on `kind`.

        Raises:
            BadRow: a field is missing or of a wrong type.
            BrokenTurns: the turns are not a conversation.
            PromptsDiffer: a pair's answers are to different prompts.
        """
        ...
