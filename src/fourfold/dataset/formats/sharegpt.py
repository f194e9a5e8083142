"""Conversations as lists of messages, each with a role (`from`) and a text (`value`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fourfold.dataset.fields import tools_field
from fourfold.dataset.formats.interface import RawRow, RowKind
from fourfold.dataset.info import DatasetEntry, Tags
from fourfold.dataset.rows import Message, Role, Row
from fourfold.dataset.turns import message_list, read_pair, read_role, role_names, row_of_turns, tagged_text


def parse(raw: RawRow, entry: DatasetEntry, kind: RowKind) -> Row:
    """The row of a sharegpt-like record.

    Raises:
        BadRow: a field is missing or of a wrong type.
        PromptsDiffer: a pair's answers are to different prompts.
        BrokenTurns: a role that is not known, or turns that do not alternate.
    """
    tags, columns = entry.tags, entry.columns
    names = role_names(tags)
    answers = None
    if kind == "preference":
        messages, answers = read_pair(raw, entry, partial(_message, tags=tags, names=names))
    else:
        messages = [_message(message, tags, names) for message in message_list(raw, entry)]
    return row_of_turns(raw, entry, kind, messages, answers, tools_field(raw, columns.tools))


def _message(message: Any, tags: Tags, names: Mapping[str, Role]) -> Message:
    return Message.of(read_role(message, tags, names), tagged_text(message, tags.content_tag, "text"))
