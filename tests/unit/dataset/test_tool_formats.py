"""Every tool format reads what it writes."""

from __future__ import annotations

import json

import pytest

from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.tools import ToolCall, ToolFormat, load_tool_format, parse_function_turn, tool_format_names

WORDS = {"thought_words": ("<think>\n", "\n</think>\n\n"), "tool_call_words": ("<tool_call>", "</tool_call>")}
FIRST = ToolCall("get_weather", {"city": "São Paulo", "days": [1, 2.5], "deep": {"a": None, "b": True}})
SECOND = ToolCall("add", {"a": 1, "text": "two\nlines"})
TOOLS = json.dumps([{"name": "first", "parameters": {}}, {"type": "function", "function": {"name": "second"}}])


@pytest.mark.parametrize("name", tool_format_names())
def test_read_when_the_format_wrote_it_gives_the_calls_back(name: str) -> None:
    tool_format = load_tool_format(name)
    assert tool_format.read(tool_format.write([FIRST])) == [FIRST]
    if name != "glm4":
        assert tool_format.read(tool_format.write([FIRST, SECOND])) == [FIRST, SECOND]
    assert tool_format.read("The weather is fine.") is None


@pytest.mark.parametrize("name", tool_format_names())
def test_describe_when_tools_are_plain_or_wrapped_names_all(name: str) -> None:
    text = load_tool_format(name).describe(TOOLS)
    assert "first" in text
    assert "second" in text
    assert load_tool_format(name).describe("[]") == ""


def test_write_when_the_format_knows_one_call_refuses_two() -> None:
    with pytest.raises(DataError, match="glm4 cannot write 2 calls"):
        load_tool_format("glm4").write([FIRST, SECOND])


def test_describe_when_a_tool_has_no_name_says_what_is_missing() -> None:
    with pytest.raises(DataError, match="Each needs"):
        load_tool_format("default").describe('[{"description": "d"}]')


def test_read_when_arguments_are_broken_finds_no_call() -> None:
    assert load_tool_format("default").read("Action: f\nAction Input: {broken") is None
    assert load_tool_format("lfm2").read("<|tool_call_start|>[f(1)]<|tool_call_end|>") is None


def test_tool_format_when_its_head_is_wrong_names_the_file() -> None:
    with pytest.raises(ConfigError, match=r"mine\.jinja"):
        ToolFormat("mine", "{#---\npatern: x\n---#}\n")


def test_parse_function_turn_when_calls_are_wrapped_keeps_what_stands_around() -> None:
    first, second = (f"<tool_call>{json.dumps({'name': name, 'arguments': {}})}</tool_call>" for name in "ab")
    text = f"So:\n{first}{second}"
    assert parse_function_turn(text, **WORDS) == ("So:\n", [ToolCall("a", {}), ToolCall("b", {})])


def test_parse_function_turn_when_a_thought_stands_before_keeps_it() -> None:
    text = '<think>\nhm\n</think>\n\n[{"name": "a", "arguments": {"x": 1}}]'
    assert parse_function_turn(text, **WORDS) == ("<think>\nhm\n</think>\n\n", [ToolCall("a", {"x": 1})])
