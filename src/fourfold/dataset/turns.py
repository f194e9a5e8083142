"""Conversations as data sets write them: lists of messages with a role and a content, whatever they call these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fourfold.dataset.fields import needed_bool, show, text_field
from fourfold.dataset.formats.interface import BadRow, BrokenTurns, PromptsDiffer, RawRow, RowKind
from fourfold.dataset.info import DatasetEntry, Tags
from fourfold.dataset.rows import Message, Role, Row

_ASKING: tuple[Role, ...] = ("user", "observation")
_ANSWERING: tuple[Role, ...] = ("assistant", "function")


def role_names(tags: Tags) -> dict[str, Role]:
    """What a data set calls each role -> the role."""
    named: dict[str | None, Role] = {
        tags.system_tag: "system",
        tags.function_tag: "function",
        tags.observation_tag: "observation",
        tags.assistant_tag: "assistant",
        tags.user_tag: "user",
    }
    return {name: role for name, role in named.items() if name is not None}


def message_list(raw: RawRow, entry: DatasetEntry) -> list[Any]:
    """The messages of a row.

    Raises:
        BadRow: they are missing or not a list.
    """
    column = entry.columns.messages
    messages = None if column is None else raw.get(column)
    if messages is None:
        raise BadRow(f"{column!r} is missing (the messages)")
    if not isinstance(messages, list):
        raise BadRow(f"{column!r} must be a list of messages, not {show(messages)}")
    return messages


def read_pair(
    raw: RawRow, entry: DatasetEntry, read: Callable[[Any], Message]
) -> tuple[list[Message], tuple[Message, Message]]:
    """The prompt and both answers of a preference row.

    An answer is a message, or a list of messages that ends with it; what comes before is the prompt, where the row has
    no column of messages, and must be the same for both.

    Args:
        read: a message of the format.
    Raises:
        BadRow: one is missing or of a wrong type.
        PromptsDiffer: the answers are to different prompts.
    """
    columns = entry.columns
    talks = [_talk(raw, column, read) for column in (columns.chosen, columns.rejected)]
    prompts = [talk[:-1] for talk in talks]
    if prompts[0] != prompts[1]:
        raise PromptsDiffer(f"{columns.chosen!r} and {columns.rejected!r} answer different prompts")
    answers = talks[0][-1], talks[1][-1]
    if prompts[0] and (columns.messages is None or raw.get(columns.messages) is None):
        return prompts[0], answers
    return [read(message) for message in message_list(raw, entry)], answers


def _talk(raw: RawRow, column: str | None, read: Callable[[Any], Message]) -> list[Message]:
    value = None if column is None else raw.get(column)
    if isinstance(value, dict):
        return [read(value)]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column!r} must be a message (an answer of the pair) or a list of messages, not {show(value)}")
    return [read(message) for message in value]


def tagged_text(message: Any, tag: str | None, what: str) -> str:
    """The text that a message holds under `tag`.

    Raises:
        BadRow: it is missing or not a text.
    """
    value = message.get(tag) if isinstance(message, dict) else None
    if not isinstance(value, str):
        raise BadRow(f"a message lacks {tag!r} (its {what}): {show(message)}")
    return value


def read_role(message: Any, tags: Tags, names: Mapping[str, Role]) -> Role:
    """The role of a message.

    Raises:
        BrokenTurns: the data set names no such role.
    """
    name = tagged_text(message, tags.role_tag, "role")
    if name not in names:
        raise BrokenTurns(f"the role {name!r} is none of {', '.join(names)}")
    return names[name]


def take_system(raw: RawRow, entry: DatasetEntry, messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The system prompt, from a first message of that role or else from its column, and the other messages."""
    if messages and messages[0].role == "system":
        return messages[0].text, messages[1:]
    return text_field(raw, entry.columns.system) or "", messages


def check_turns(messages: Sequence[Message], *, answered: bool) -> None:
    """Refuse turns that do not alternate, beginning with a user's.

    Args:
        answered: whether the last turn must be an answer, or else one that asks for it.
    Raises:
        BrokenTurns: says which turn is wrong.
    """
    for index, message in enumerate(messages):
        expected = _ANSWERING if index % 2 else _ASKING
        if message.role not in expected:
            raise BrokenTurns(f"turn {index + 1} is of role {message.role}, not {' or '.join(expected)}")
    if not messages or (len(messages) % 2 == 0) != answered:
        raise BrokenTurns(f"{len(messages)} turns do not end with {'an answer' if answered else 'a question'}")


def row_of_turns(
    raw: RawRow,
    entry: DatasetEntry,
    kind: RowKind,
    messages: Sequence[Message],
    answers: tuple[Message, Message] | None,
    tools: str,
) -> Row:
    """The row of a conversation.

    Args:
        messages: all of it, with the system prompt as its first message or not at all.
        answers: the chosen and the rejected answer of a preference row.
    Raises:
        BrokenTurns, BadRow: as the format's `parse`.
    """
    system, turns = take_system(raw, entry, messages)
    if kind == "text":
        if not turns:
            raise BrokenTurns("there is no message")
        return Row(text=turns[0].text, leaves_out=len(turns) > 1)
    if answers is not None:
        check_turns(turns, answered=False)
        check_turns((*turns, answers[0]), answered=True)
        check_turns((*turns, answers[1]), answered=True)
        return Row(tuple(turns), response=answers[0], rejected=answers[1], system=system, tools=tools)
    if kind == "prompt" and len(turns) % 2 == 1:
        check_turns(turns, answered=False)
        return Row(tuple(turns), system=system, tools=tools)
    check_turns(turns, answered=True)
    desirable = needed_bool(raw, entry.columns.kto_tag, "KTO tag") if kind == "kto" else None
    return Row(tuple(turns[:-1]), response=turns[-1], desirable=desirable, system=system, tools=tools)
