"""Rendering with a tokenizer's own chat template (`template: auto`).

Most of these templates do not mark what the model writes. Then the response's span is found by rendering prefixes: a
conversation up to the prompt, with the opening of a response, and up to the response; the first must be a prefix of
the second, and the second of the next turn's first. Templates that show earlier turns otherwise when the conversation
goes on (most reasoning models drop thoughts) do not nest so; of these only the last response can be trained.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, meta

from fourfold.base.errors import ConfigError, DataError
from fourfold.base.log import get_logger
from fourfold.dataset.chat_jinja import Marks, chat_environment
from fourfold.dataset.marked_body import pair_blocks, split_blocks
from fourfold.dataset.rows import Message
from fourfold.dataset.segments import Segment, SegmentPair, join_turns
from fourfold.dataset.template import Template
from fourfold.dataset.tools import (
    ToolCall,
    ToolFormat,
    load_tool_format,
    parse_function_turn,
    parse_tools,
    tool_format_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_WAY_OUT = "Name a template that suits the model, such as chatml, llama3 or qwen; docs/templates.md lists them."
_PROBE = ToolCall("get_weather", {"city": "Paris"})


class AutoTemplate:
    """Renders with a tokenizer's own chat template, as transformers' `apply_chat_template` does.

    Args:
        template: `auto`.
        tokenizer: for its special tokens, and its name in messages.
        tool_format: describes and writes tool calls instead of the template; None leaves it to the template, or, where
            that has no place for tools, takes the default format.
        default_system: system prompt of a conversation that has none; "" leaves it to the template.
        enable_thinking: passed to the template; None leaves it to the template.
        today: see `chat_environment`.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        tool_format: ToolFormat | None,
        default_system: str,
        enable_thinking: bool | None,
        today: datetime.date | None,
    ) -> None:
        self._tokenizer, self._default_system, self._today = tokenizer, default_system, today
        self._facts, self._source = template.facts, template.body
        environment = chat_environment(today)
        try:
            self._jinja = environment.from_string(template.body)
            variables = meta.find_undeclared_variables(environment.parse(template.body))
        except TemplateError as error:
            raise ConfigError(f"template: {self._name} is not valid Jinja ({error}). {_WAY_OUT}") from error
        self._has_marks = _GENERATION.search(template.body) is not None
        self._settings: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._tools = tool_format
        if tool_format is None and "tools" not in variables:
            self._tools = load_tool_format("default", today=today)

    @property
    def _name(self) -> str:
        return f"the chat template of {self._tokenizer.name_or_path or 'the tokenizer'}"

    def turns(self, messages: Sequence[Message], system: str, tools: str) -> list[SegmentPair]:
        """See `ConversationRenderer`.

        Raises:
            ConfigError: the prefixes do not nest.
        """
        if self._has_marks:
            return self._marked_turns(messages, system, tools)
        turns: list[SegmentPair] = []
        before = ""
        for end in range(2, len(messages) + 1, 2):
            opened, closed = self._open_and_closed(messages[:end], system, tools)
            if not opened.startswith(before):
                raise ConfigError(
                    f"template: {self._name} shows turn {end // 2 - 1} of a conversation otherwise once it goes on"
                    " (as templates do that drop earlier thoughts), so its responses cannot be trained together."
                    f" Train only the last of each with mask_history: true. Or: {_WAY_OUT}"
                )
            turns.append(_plain_turn(opened[len(before) :], closed[len(opened) :]))
            before = closed
        return turns

    def last_turn(self, messages: Sequence[Message], system: str, tools: str) -> SegmentPair:
        """See `ConversationRenderer`.

        Raises:
            ConfigError: the text of the prompt is not a prefix of the text with the response.
        """
        if self._has_marks:
            return join_turns(self._marked_turns(messages, system, tools))
        opened, closed = self._open_and_closed(messages, system, tools)
        earlier = [segment.text for segment in self.prompt(messages[:-1], system, tools)]
        segments = [Segment(text, trained=False) for text in earlier]
        return segments, [Segment(closed[len(opened) :], trained=True)]

    def prompt(self, messages: Sequence[Message], system: str, tools: str) -> list[Segment]:
        """See `ConversationRenderer`: turn by turn where the prefixes nest, as in training, else in one piece."""
        whole = self._render(messages, system, tools, add_generation_prompt=True)
        try:
            earlier = join_turns(self.turns(messages[:-1], system, tools)) if len(messages) > 1 else ([], [])
        except ConfigError:
            return [Segment(whole, trained=False)]
        segments = [Segment(part.text, trained=False, token_id=part.token_id) for half in earlier for part in half]
        text = "".join(segment.text for segment in segments)
        if not whole.startswith(text):
            return [Segment(whole, trained=False)]
        return [*segments, Segment(whole[len(text) :], trained=False)]

    def read_calls(self, text: str) -> list[ToolCall] | None:
        """See `ConversationRenderer`."""
        return None if self._reader is None else self._reader.read(text)

    def turn_ends(self) -> set[int]:
        """See `ConversationRenderer`: the special token right after the content of a response, if there is one."""
        answer = "Yes."
        try:
            _, response = self.last_turn([Message.of("user", "Is it?"), Message.of("assistant", answer)], "", "")
        except (ConfigError, DataError):
            return set()
        rest = "".join(segment.text for segment in response).partition(answer)[2].strip()
        added = {str(token): number for number, token in self._tokenizer.added_tokens_decoder.items()}
        return {added[word] for word in added if rest.startswith(word)}

    @cached_property
    def _reader(self) -> ToolFormat | None:
        """What reads the calls that this template writes: the tool format in use, or one that reads its own."""
        if self._tools is not None:
            return self._tools
        call = json.dumps({"name": _PROBE.name, "arguments": _PROBE.arguments})
        tools = json.dumps([{"name": _PROBE.name, "description": "", "parameters": {"type": "object"}}])
        try:
            turn = self.last_turn([Message.of("user", "Weather?"), Message.of("function", call)], "", tools)
        except (ConfigError, DataError):
            return None
        text = "".join(segment.text for segment in turn[1])
        ends = [str(token) for token in self._tokenizer.all_special_tokens]
        for end in (end for end in ends if text.strip().endswith(end)):
            text = text.strip().removesuffix(end)
        formats = (load_tool_format(name, today=self._today) for name in tool_format_names())
        return next((entry for entry in formats if entry.read(text) == [_PROBE]), None)

    def _marked_turns(self, messages: Sequence[Message], system: str, tools: str) -> list[SegmentPair]:
        shown = self._show(messages, system)
        marks = Marks.absent_from([json.dumps(shown), tools, self._source])
        rendered = self._render(messages, system, tools, marks=marks.variables())
        return pair_blocks(split_blocks(marks, rendered, {}), len(messages) // 2, self._name)

    def _open_and_closed(self, messages: Sequence[Message], system: str, tools: str) -> tuple[str, str]:
        """The text up to where the last response begins, and up to where it ends."""
        opened = self._render(messages[:-1], system, tools, add_generation_prompt=True)
        closed = self._render(messages, system, tools)
        if not closed.startswith(opened):
            raise ConfigError(
                f"template: {self._name} opens a response with {opened[-40:]!r}, but does not show it so once it is"
                f" written, so where the response begins cannot be told. {_WAY_OUT}"
            )
        return opened, closed

    def _render(
        self,
        messages: Sequence[Message],
        system: str,
        tools: str,
        *,
        add_generation_prompt: bool = False,
        marks: Mapping[str, str] | None = None,
    ) -> str:
        native = parse_tools(tools) if tools and self._tools is None else None
        system = system or self._default_system
        if tools and self._tools is not None:
            system += self._tools.describe(tools)
        try:
            return self._jinja.render(
                messages=self._show(messages, system),
                tools=[
                    tool if tool.get("type") == "function" else {"type": "function", "function": tool}
                    for tool in native
                ]
                if native
                else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._tokenizer.special_tokens_map, **self._settings, **(marks or {})},
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"template: {self._name} cannot render this conversation: {error}. {_WAY_OUT}") from error

    def _show(self, messages: Sequence[Message], system: str) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        called = ""
        for index, message in enumerate(messages):
            if message.role == "function":
                before, calls = parse_function_turn(
                    message.text, thought_words=self._facts.thought_words, tool_call_words=self._facts.tool_call_words
                )
                called = f"call{index:05d}"  # nine letters and digits, as some templates insist
                shown.append(self._show_calls(before, calls, called))
            elif message.role == "observation" and self._tools is None:
                shown.append({"role": "tool", "content": message.text, "tool_call_id": called})
            else:
                role = "user" if message.role == "observation" else message.role
                shown.append({"role": role, "content": message.text})
        return shown

    def _show_calls(self, before: str, calls: Sequence[ToolCall], called: str) -> dict[str, Any]:
        if self._tools is not None:
            return {"role": "assistant", "content": before + self._tools.write(calls)}
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
        entries = [{"id": called, "type": "function", "function": function} for function in functions]
        return {"role": "assistant", "content": before, "tool_calls": entries}


def _plain_turn(prompt: str, response: str) -> SegmentPair:
    return [Segment(prompt, trained=False)], [Segment(response, trained=True)]
