"""Rows of instruction, input and output, with an optional history of earlier turns."""

from __future__ import annotations

from fourfold.dataset.fields import needed_bool, needed_text, show, text_field, tools_field
from fourfold.dataset.formats.interface import BadRow, RawRow, RowKind
from fourfold.dataset.info import DatasetEntry
from fourfold.dataset.rows import Message, Row


def parse(raw: RawRow, entry: DatasetEntry, kind: RowKind) -> Row:
    """The row of an alpaca-like record; instruction and input are joined by a line break.

    Raises:
        BadRow: a field that `kind` needs is missing or of a wrong type.
    """
    columns = entry.columns
    prompt = _prompt(raw, entry)
    if kind == "text":
        return Row(text=prompt, leaves_out=bool(raw.get(columns.response or "")))
    messages = (*_history(raw, columns.history), Message.of("user", prompt))
    system = text_field(raw, columns.system) or ""
    tools = tools_field(raw, columns.tools)
    if kind == "preference":
        return Row(
            messages,
            response=Message.of("assistant", needed_text(raw, columns.chosen, "chosen answer")),
            rejected=Message.of("assistant", needed_text(raw, columns.rejected, "rejected answer")),
            system=system,
            tools=tools,
        )
    answer = text_field(raw, columns.response)
    if answer is None and kind != "prompt":
        answer = needed_text(raw, columns.response, "response")
    response = None if answer is None else Message.of("assistant", answer)
    desirable = needed_bool(raw, columns.kto_tag, "KTO tag") if kind == "kto" else None
    return Row(messages, response=response, desirable=desirable, system=system, tools=tools)


def _prompt(raw: RawRow, entry: DatasetEntry) -> str:
    instruction, query = text_field(raw, entry.columns.prompt), text_field(raw, entry.columns.query)
    if instruction is None and query is None:
        return needed_text(raw, entry.columns.prompt, "prompt")
    return "\n".join(part for part in (instruction, query) if part)


def _history(raw: RawRow, column: str | None) -> list[Message]:
    turns = None if column is None else raw.get(column)
    if turns is None:
        return []
    messages: list[Message] = []
    for turn in turns if isinstance(turns, list) else [turns]:
        match turn:
            case [str(prompt), str(answer)]:
                messages += (Message.of("user", prompt), Message.of("assistant", answer))
            case _:
                raise BadRow(f"{column!r} must be a list of [prompt, answer] pairs, not {show(turns)}")
    return messages
