"""Tool calls in text: how tools are described to a model, how it calls them, and how calls are read back.

A tool format is one file, `tool_formats/<name>.jinja`: two macros, `describe(tools)` and `write(calls)`, and at its
head, in the comment between `{#---` and `---#}`, how a call is found in what a model wrote (see `ReadFacts`).
"""

from __future__ import annotations

import ast
import datetime
import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, ValidationError

from fourfold.base import registry
from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.chat_jinja import chat_environment

_PACKAGE = "fourfold.dataset.tool_formats"
_FRONT_MATTER = re.compile(r"\A\{#---\n(?P<facts>.*?)\n---#\}\n?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool; `arguments` is what its JSON holds, an object in all sound cases."""

    name: str
    arguments: Any


class ReadFacts(BaseModel):
    """How calls are found in a model's text.

    Attributes:
        pattern: finds a call. Its group `json` is a call or a list of calls as JSON; or its groups `name` and
            `arguments` (JSON) or `name` and `parameters` (searched with `parameter`) make one; or its group `python` is
            calls in Python's syntax, with keywords only.
        parameter: finds one parameter within `parameters`, by its groups `key` and `value` (JSON, or else a string).
        arguments_key: the key of the arguments within `json`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    parameter: str = ""
    arguments_key: str = "arguments"


class ToolFormat:
    """A tool format.

    Args:
        name: its config value.
        source: the text of its file.
        today: the date told to formats that state one; the present day if None.
    Raises:
        ConfigError: the facts at its head are not valid.
    """

    def __init__(self, name: str, source: str, *, today: datetime.date | None = None) -> None:
        self.name = name
        match = _FRONT_MATTER.match(source)
        try:
            self._read = ReadFacts.model_validate(yaml.safe_load(match["facts"]) if match else None)
        except (yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"tool_format: the head of {name}.jinja is not valid: {error}. Fix it.") from error
        self.macros = source[match.end() :] if match else source
        module = chat_environment(today).from_string(self.macros).module
        self._describe, self._write = module.__dict__["describe"], module.__dict__["write"]

    def describe(self, tools: str) -> str:
        """The text that tells a model of its tools; "" for an empty list.

        Args:
            tools: JSON list of descriptions, each plain or wrapped as {"type": "function", "function": ...}.
        Raises:
            DataError: not a JSON list of objects with a name.
        """
        parsed = parse_tools(tools)
        try:
            return str(self._describe(parsed)) if parsed else ""
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"tools: {tools[:200]!r} cannot be described in the tool format {self.name} ({error})."
                ' Each needs "name", "description" and "parameters" (a JSON schema).'
            ) from error

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The text with which a model calls tools.

        Raises:
            DataError: the format cannot hold these calls (several at once where it knows only one).
        """
        try:
            return str(self._write([{"name": call.name, "arguments": call.arguments} for call in calls]))
        except TemplateError as error:
            raise DataError(f"tool_format: {self.name} cannot write {len(calls)} calls: {error}.") from error

    def read(self, text: str) -> list[ToolCall] | None:
        """The calls in a model's text, the inverse of `write`; None if there are none."""
        calls: list[ToolCall] = []
        for match in re.finditer(self._read.pattern, text, re.DOTALL):
            try:
                calls += self._read_one(match.groupdict())
            except (ValueError, SyntaxError, KeyError, TypeError, RecursionError):
                return None
        return calls or None

    def _read_one(self, groups: dict[str, str | None]) -> list[ToolCall]:
        if groups.get("json") is not None:
            parsed = json.loads(groups["json"] or "")
            entries = parsed if isinstance(parsed, list) else [parsed]
            return [ToolCall(entry["name"], entry[self._read.arguments_key]) for entry in entries]
        if groups.get("python") is not None:
            return _read_python(groups["python"] or "")
        name = (groups["name"] or "").strip()
        if groups.get("arguments") is not None:
            return [ToolCall(name, json.loads(groups["arguments"] or ""))]
        found = re.finditer(self._read.parameter, groups["parameters"] or "", re.DOTALL)
        return [ToolCall(name, {item["key"]: _json_or_text(item["value"]) for item in found})]


def parse_tools(tools: str) -> list[dict[str, Any]]:
    """The descriptions of tools from their JSON.

    Raises:
        DataError: not a JSON list of objects.
    """
    try:
        parsed = json.loads(tools)
    except json.JSONDecodeError as error:
        raise DataError(f"tools: {tools[:200]!r} is not valid JSON ({error}). Give a JSON list.") from error
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise DataError(f"tools: expected a JSON list of objects, got {tools[:200]!r}. Wrap it in a list.")
    return parsed


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _read_python(text: str) -> list[ToolCall]:
    """The calls in `name(key=value, ...), ...`; JSON's true, false and null are values too.

    Raises:
        ValueError, SyntaxError: it is anything else.
    """
    calls = []
    # Strings are written as they are, so a line break may stand in one; between tokens it means nothing.
    listed = ast.parse("[" + text.replace("\n", "\\n") + "]", mode="eval").body
    for node in listed.elts if isinstance(listed, ast.List) else []:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError(text)
        arguments = {word.arg: ast.literal_eval(_JsonNames().visit(word.value)) for word in node.keywords}
        calls.append(ToolCall(node.func.id, arguments))
    return calls


class _JsonNames(ast.NodeTransformer):
    """Puts Python's constants in the place of JSON's names for them."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        names = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(names[node.id]), node) if node.id in names else node


def tool_format_names() -> list[str]:
    """The valid values of `tool_format:`."""
    return registry.names(_PACKAGE, suffix=".jinja")


def load_tool_format(name: str, *, today: datetime.date | None = None) -> ToolFormat:
    """The tool format of a config value.

    Raises:
        ConfigError: no such format.
    """
    if name not in tool_format_names():
        raise ConfigError(registry.unknown("tool_format", name, tool_format_names()))
    file = importlib.resources.files(_PACKAGE).joinpath(f"{name}.jinja")
    return ToolFormat(name, file.read_text(encoding="utf-8"), today=today)


def parse_function_turn(
    text: str, *, thought_words: tuple[str, str], tool_call_words: tuple[str, str]
) -> tuple[str, list[ToolCall]]:
    """What stands before the calls of a data set's function turn, and the calls.

    The calls are one JSON object {"name", "arguments"} or a list of them. They may be wrapped in `tool_call_words`,
    then anything may stand around them; or a thought may stand before them.

    Raises:
        DataError: no such JSON.
    """
    start, end = (re.escape(word) for word in tool_call_words)
    blocks = list(re.finditer(f"{start}(.*?){end}", text, re.DOTALL))
    if blocks:
        before = re.sub(f"{start}.*?{end}", "", text, flags=re.DOTALL)
        return before, [call for block in blocks for call in _parse_calls(block[1], text)]
    start, end = (re.escape(word) for word in thought_words)
    thought = re.search(f"{start}.*?{end}", text, re.DOTALL)
    if thought is None:
        return "", _parse_calls(text, text)
    return thought[0], _parse_calls(text.replace(thought[0], ""), text)


def _parse_calls(calls: str, text: str) -> list[ToolCall]:
    try:
        parsed = json.loads(calls)
        entries = parsed if isinstance(parsed, list) else [parsed]
        return [ToolCall(entry["name"], _decoded(entry["arguments"])) for entry in entries]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"messages: the function turn {text[:200]!r} is not the JSON of tool calls."
            ' Write {"name": ..., "arguments": {...}} or a list of these.'
        ) from error


def _decoded(arguments: Any) -> Any:
    """Arguments given as a string of JSON, as OpenAI's API writes them, are the object they spell."""
    if not isinstance(arguments, str):
        return arguments
    decoded = _json_or_text(arguments)
    return decoded if isinstance(decoded, dict) else arguments
