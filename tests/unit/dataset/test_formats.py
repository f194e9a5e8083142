"""Formats: raw rows to rows of messages, for every kind of stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.base import registry
from fourfold.dataset.formats.interface import BadRow, BrokenTurns, RowKind
from fourfold.dataset.info import FORMATS_PACKAGE, parse_entry
from fourfold.dataset.rows import Row
from fourfold.dataset.tokenise import find_parser

OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def parse(raw: dict[str, Any], kind: RowKind = "chat", **entry: Any) -> Row:
    parsed = parse_entry("a", {"file_name": "a.json", **entry}, Path())
    return find_parser(parsed.formatting)(raw, parsed, kind)


def turns(row: Row) -> list[tuple[str, str]]:
    answers = [] if row.response is None else [row.response]
    return [(message.role, message.text) for message in (*row.messages, *answers)]


def test_formats_folder_when_listed_has_the_documented_names() -> None:
    assert registry.names(FORMATS_PACKAGE) == ["alpaca", "openai", "sharegpt", "text"]


def test_alpaca_when_input_is_given_joins_it_by_a_line_break() -> None:
    assert turns(parse({"instruction": "a", "input": "b", "output": "c"})) == [("user", "a\nb"), ("assistant", "c")]
    assert turns(parse({"instruction": "a", "input": "", "output": "c"})) == [("user", "a"), ("assistant", "c")]
    assert turns(parse({"instruction": "", "input": "b", "output": ""})) == [("user", "b"), ("assistant", "")]


def test_alpaca_when_history_system_and_tools_are_named_reads_them() -> None:
    columns = {"prompt": "p", "response": "r", "history": "h", "system": "s", "tools": "t"}
    raw = {"p": "3", "r": "4", "h": [["1", "2"]], "s": "be brief", "t": [{"name": "f"}]}
    row = parse(raw, columns=columns)
    assert turns(row) == [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    assert (row.system, json.loads(row.tools)) == ("be brief", [{"name": "f"}])


def test_alpaca_when_stage_is_pt_takes_the_prompt_only() -> None:
    row = parse({"text": "words", "other": 1}, "text", columns={"prompt": "text"})
    assert (row.text, row.messages, row.response) == ("words", (), None)


def test_alpaca_when_stage_needs_pairs_or_tags_reads_them() -> None:
    columns = {"prompt": "p", "response": "r", "chosen": "c", "rejected": "x", "kto_tag": "k"}
    raw = {"p": "1", "r": "2", "c": "good", "x": "bad", "k": False}
    pair = parse(raw, "preference", columns=columns, ranking=True)
    assert pair.response is not None
    assert pair.rejected is not None
    assert (pair.response.text, pair.rejected.text) == ("good", "bad")
    assert parse(raw, "kto", columns=columns).desirable is False
    assert parse({"p": "1"}, "prompt", columns=columns).response is None


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        ({"output": "b"}, "chat", "'instruction' is missing (the prompt)"),
        ({"instruction": "a"}, "chat", "'output' is missing (the response)"),
        ({"instruction": "a", "output": None}, "chat", "'output' is missing (the response)"),
        ({"instruction": "a", "output": 3}, "chat", "'output' must be a text, not 3"),
        ({"instruction": "a", "output": "b"}, "preference", "names no column for its chosen answer"),
        ({"instruction": "a", "output": "b"}, "kto", "must be true or false (the KTO tag)"),
    ],
)
def test_alpaca_when_a_field_is_missing_names_it(raw: dict[str, Any], kind: RowKind, message: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse(raw, kind)
    assert message in str(caught.value)
    assert not isinstance(caught.value, BrokenTurns)


def test_alpaca_when_history_is_no_list_of_pairs_says_so() -> None:
    columns = {"prompt": "p", "response": "r", "history": "h"}
    with pytest.raises(BadRow, match=r"'h' must be a list of \[prompt, answer\] pairs"):
        parse({"p": "1", "r": "2", "h": [["only one"]]}, columns=columns)


def say(*pairs: str) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in zip(pairs[::2], pairs[1::2], strict=True)]


def test_sharegpt_when_roles_alternate_reads_all_of_them() -> None:
    raw = {"conversations": say("system", "S", "human", "1", "function_call", "2", "observation", "3", "gpt", "4")}
    row = parse(raw, formatting="sharegpt")
    assert row.system == "S"
    assert turns(row) == [("user", "1"), ("function", "2"), ("observation", "3"), ("assistant", "4")]


def test_sharegpt_when_system_is_a_column_reads_it() -> None:
    columns = {"messages": "m", "system": "s", "tools": "t"}
    row = parse({"m": say("human", "1", "gpt", "2"), "s": "S", "t": "[]"}, formatting="sharegpt", columns=columns)
    assert (row.system, row.tools) == ("S", "[]")


def test_sharegpt_when_stage_needs_pairs_or_tags_reads_them() -> None:
    columns = {"messages": "m", "chosen": "c", "rejected": "x", "kto_tag": "k"}
    raw = {"m": say("human", "1"), "c": say("gpt", "good")[0], "x": say("gpt", "bad")[0]}
    pair = parse(raw, "preference", formatting="sharegpt", ranking=True, columns=columns)
    assert turns(pair) == [("user", "1"), ("assistant", "good")]
    assert pair.rejected is not None
    assert pair.rejected.text == "bad"
    tagged = parse({"m": say("human", "1", "gpt", "2"), "k": True}, "kto", formatting="sharegpt", columns=columns)
    assert (tagged.desirable, turns(tagged)) == (True, [("user", "1"), ("assistant", "2")])
    assert turns(parse(raw, "prompt", formatting="sharegpt", columns=columns)) == [("user", "1")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (say("gpt", "1", "human", "2"), "turn 1 is of role assistant, not user or observation"),
        (say("human", "1", "human", "2"), "turn 2 is of role user, not assistant or function"),
        (say("human", "1", "gpt", "2", "human", "3"), "3 turns do not end with an answer"),
        (say("human", "1", "bot", "2"), "the role 'bot' is none of"),
        ([], "0 turns do not end with an answer"),
    ],
)
def test_sharegpt_when_turns_are_broken_says_which(messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(BrokenTurns) as caught:
        parse({"conversations": messages}, formatting="sharegpt")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "'conversations' is missing (the messages)"),
        ({"conversations": "hello"}, "'conversations' must be a list of messages"),
        ({"conversations": [{"from": "human"}]}, "a message lacks 'value' (its text)"),
        ({"conversations": ["hello"]}, "a message lacks 'from' (its role)"),
    ],
)
def test_sharegpt_when_a_field_is_missing_names_it(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse(raw, formatting="sharegpt")
    assert message in str(caught.value)
    assert not isinstance(caught.value, BrokenTurns)


def test_sharegpt_when_tags_name_no_system_role_refuses_it() -> None:
    raw = {"conversations": [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}]}
    with pytest.raises(BrokenTurns, match="the role 'system' is none of assistant, user"):
        parse(raw, formatting="sharegpt", tags=OPENAI_TAGS)


def test_openai_when_tools_are_called_makes_function_and_observation_turns() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    raw = {
        "messages": [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "tool_call_id": "2", "content": "two"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    row = parse(raw, formatting="openai", columns={"messages": "messages", "tools": "tools"})
    assert row.system == "S"
    assert [message.role for message in row.messages] == ["user", "function", "observation"]
    assert json.loads(row.messages[1].text) == [call["function"], call["function"]]
    assert row.messages[2].text == "one\n</tool_response>\n<tool_response>\ntwo"
    assert json.loads(row.tools)[0]["function"]["name"] == "f"


def test_openai_when_stage_needs_pairs_reads_messages_and_lists_of_one() -> None:
    columns = {"messages": "m", "chosen": "c", "rejected": "x"}
    answer = {"role": "assistant", "content": "good"}
    raw = {"m": [{"role": "user", "content": "1"}], "c": answer, "x": [{**answer, "content": "bad"}]}
    row = parse(raw, "preference", formatting="openai", ranking=True, columns=columns)
    assert row.rejected is not None
    assert row.rejected.text == "bad"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "content": None}, "a message lacks 'content' (its text)"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a message lacks 'content' (its text)"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "'tool_calls' must be a list of"),
    ],
)
def test_openai_when_a_message_is_malformed_says_so(message: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse({"messages": [message]}, formatting="openai")
    assert complaint in str(caught.value)


def test_text_when_stage_is_pt_reads_the_column() -> None:
    assert parse({"text": "words"}, "text", formatting="text").text == "words"
    with pytest.raises(BadRow, match=r"'text' is missing \(the text\)"):
        parse({}, "text", formatting="text")
    with pytest.raises(BadRow, match="stage pt only"):
        parse({"text": "words"}, "chat", formatting="text")
