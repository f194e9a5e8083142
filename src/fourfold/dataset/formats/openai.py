"""Messages as OpenAI's chat API writes them, with `tool_calls` of the assistant and answers of role `tool`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from fourfold.dataset.fields import show, tools_field
from fourfold.dataset.formats.interface import BadRow, RawRow, RowKind
from fourfold.dataset.info import DatasetEntry, Tags
from fourfold.dataset.rows import Message, Role, Row
from fourfold.dataset.turns import message_list, read_pair, read_role, role_names, row_of_turns

_ANSWERS_JOINT = "\n</tool_response>\n<tool_response>\n"
"""Stands between the answers of several tools, which make one turn; as LLaMA-Factory has it."""


def parse(raw: RawRow, entry: DatasetEntry, kind: RowKind) -> Row:
    """The row of a record of messages.

    An assistant message with `tool_calls` becomes the call; text beside the calls is left out. Tool answers in
    succession become one turn.

    Raises:
        BadRow: a field is missing or of a wrong type.
        PromptsDiffer: a pair's answers are to different prompts.
        BrokenTurns: a role that is not known, or turns that do not alternate.
    """
    tags, columns = entry.tags, entry.columns
    names: dict[str, Role] = {"developer": "system", **role_names(tags)}
    answers = None
    if kind == "preference":
        messages, answers = read_pair(raw, entry, partial(_message, tags=tags, names=names))
    else:
        messages = [_message(message, tags, names) for message in message_list(raw, entry)]
    messages = _join_answers(messages)
    return row_of_turns(raw, entry, kind, messages, answers, tools_field(raw, columns.tools))


def _message(message: Any, tags: Tags, names: Mapping[str, Role]) -> Message:
    role = read_role(message, tags, names)
    calls = message.get("tool_calls")
    if role in ("assistant", "function") and calls:
        try:
            return Message.of("function", json.dumps([call["function"] for call in calls], ensure_ascii=False))
        except (TypeError, KeyError) as error:
            raise BadRow(f"'tool_calls' must be a list of {{'function': ...}}, not {show(calls)}") from error
    return Message.of(role, _content(message, tags.content_tag))


def _content(message: dict[str, Any], tag: str | None) -> str:
    match message.get(tag or ""):
        case str(text):
            return text
        case [*parts] if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            return "".join(str(part.get("text", "")) for part in parts)
        case _:
            raise BadRow(f"a message lacks {tag!r} (its text): {show(message)}")


def _join_answers(messages: Iterable[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        if message.role == "observation" and joined and joined[-1].role == "observation":
            joined[-1] = Message.of("observation", joined[-1].text + _ANSWERS_JOINT + message.text)
        else:
            joined.append(message)
    return joined
