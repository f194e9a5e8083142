"""Plain text for pre-training: one column of text."""

from __future__ import annotations

from fourfold.dataset.fields import needed_text
from fourfold.dataset.formats.interface import BadRow, RawRow, RowKind
from fourfold.dataset.info import DatasetEntry
from fourfold.dataset.rows import Row


def parse(raw: RawRow, entry: DatasetEntry, kind: RowKind) -> Row:
    """The row of a text.

    Raises:
        BadRow: the text is missing, or the stage trains on something else than text.
    """
    if kind != "text":
        raise BadRow("plain text has no answers; it can be trained in stage pt only")
    return Row(text=needed_text(raw, entry.columns.prompt, "text"))
