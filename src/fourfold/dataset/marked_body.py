"""Rendering with a template of the project: its generation marks say what is trained."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.chat_jinja import Marks, chat_environment
from fourfold.dataset.layout import Layout, Piece, only_inserts_contents
from fourfold.dataset.rows import Message
from fourfold.dataset.segments import Segment, SegmentPair, join_turns
from fourfold.dataset.template import Template
from fourfold.dataset.tools import ToolCall, ToolFormat, parse_function_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_LAYOUTS = 1024
"""Layouts that are remembered; there is one for each sequence of roles, system prompt and list of tools."""

_LayoutKey = tuple[tuple[str, ...], str | None, bool]


class MarkedBody:
    """Renders with a template's body; see `template` for what a body sees.

    Args:
        template: any but `auto`.
        tokenizer: for its special tokens.
        tools: how tools are described and called.
        default_system: system prompt of a conversation that has none.
        today: see `chat_environment`.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        tools: ToolFormat,
        default_system: str,
        today: datetime.date | None,
    ) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._tools, self._default_system = tools, default_system
        environment = chat_environment(today)
        self._jinja = environment.from_string(template.body)
        self._layouts: dict[_LayoutKey, Layout] | None = None
        if only_inserts_contents(environment.parse(template.body)):
            self._layouts = {}

    def turns(self, messages: Sequence[Message], system: str, tools: str) -> list[SegmentPair]:
        """See `ConversationRenderer`."""
        blocks = self._render(messages, system, tools)
        return pair_blocks(blocks, len(messages) // 2, self._template.name)

    def last_turn(self, messages: Sequence[Message], system: str, tools: str) -> SegmentPair:
        """See `ConversationRenderer`."""
        return join_turns(self.turns(messages, system, tools))

    def prompt(self, messages: Sequence[Message], system: str, tools: str) -> list[Segment]:
        """See `ConversationRenderer`."""
        blocks = self._render(messages, system, tools, add_generation_prompt=True)
        return [segment for block in blocks for segment in block]

    def read_calls(self, text: str) -> list[ToolCall] | None:
        """See `ConversationRenderer`."""
        return self._tools.read(text)

    def turn_ends(self) -> set[int]:
        """See `ConversationRenderer`."""
        known = self._tokenizer.get_vocab()
        return {known[word] for word in self._template.facts.stop_words if word in known}

    def _render(
        self, messages: Sequence[Message], system: str, tools: str, *, add_generation_prompt: bool = False
    ) -> list[list[Segment]]:
        shown = [self._show(message) for message in messages]
        system = system or self._default_system
        # A list of tools, be it empty, gives a conversation a system turn, be it empty.
        full_system = system + self._tools.describe(tools) if tools else system or None
        if self._layouts is None:
            return self._render_blocks(shown, full_system, add_generation_prompt=add_generation_prompt)
        key = (tuple([entry["role"] for entry in shown]), full_system, add_generation_prompt)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._lay_out(*key)
            if len(self._layouts) < _MOST_LAYOUTS:
                self._layouts[key] = layout
        return layout.fill([entry["content"] for entry in shown])

    def _lay_out(self, roles: tuple[str, ...], system: str | None, add_generation_prompt: bool) -> Layout:
        """What the body puts around the contents of messages of these roles."""
        marks = Marks.absent_from([system or "", self._template.body])
        slots = [{"role": role, "content": marks.slot(number)} for number, role in enumerate(roles)]
        blocks = self._render_blocks(slots, system, add_generation_prompt=add_generation_prompt)
        return Layout(tuple(tuple(_piece(segment, marks) for segment in block) for block in blocks))

    def _render_blocks(
        self, shown: Sequence[Mapping[str, Any]], system: str | None, *, add_generation_prompt: bool
    ) -> list[list[Segment]]:
        marks = Marks.absent_from([system or "", self._template.body, *(entry["content"] for entry in shown)])
        try:
            rendered = self._jinja.render(
                messages=shown,
                system=system,
                bos_token=marks.bos,
                eos_token=marks.eos,
                add_generation_prompt=add_generation_prompt,
                **marks.variables(),
            )
        except TemplateError as error:
            raise DataError(f"template: {self._template.name} cannot render this conversation: {error}.") from error
        special = {
            marks.bos: (self._tokenizer.bos_token, self._tokenizer.bos_token_id),
            marks.eos: (self._tokenizer.eos_token, self._tokenizer.eos_token_id),
        }
        return split_blocks(marks, rendered, special)

    def _show(self, message: Message) -> dict[str, Any]:
        if message.role != "function":
            return {"role": message.role, "content": message.text}
        facts = self._template.facts
        before, calls = parse_function_turn(
            message.text, thought_words=facts.thought_words, tool_call_words=facts.tool_call_words
        )
        role = function_role(self._template, self._tools)
        return {"role": role, "content": before + self._tools.write(calls)}


def _piece(segment: Segment, marks: Marks) -> Piece | Segment:
    texts = marks.split_slots(segment.text)
    return Piece(texts, segment.trained) if any(isinstance(text, int) for text in texts) else segment


def function_role(template: Template, tools: ToolFormat) -> str:
    """As what a body sees a turn that calls tools: what it puts around one belongs to its own tool format only."""
    return "function" if tools.name == template.facts.tool_format else "assistant"


def split_blocks(marks: Marks, rendered: str, special: Mapping[str, tuple[object, object]]) -> list[list[Segment]]:
    """The segments in blocks: prompt, response, prompt, ..., and what stands after the last response.

    Args:
        special: for the marks that stand for a special token its text and id; id None leaves it out.
    """
    blocks: list[list[Segment]] = [[]]
    for item in marks.split(rendered):
        trained = len(blocks) % 2 == 0
        if item in (marks.open, marks.close):
            blocks.append([])
        elif item in special:
            text, token_id = special[item]
            if isinstance(token_id, int):
                blocks[-1].append(Segment(str(text), trained, token_id))
        elif item != marks.cut:
            blocks[-1].append(Segment(item, trained))
    return blocks


def pair_blocks(blocks: list[list[Segment]], num_responses: int, name: str) -> list[SegmentPair]:
    """Prompt and response of each turn. What stands after the last response is left out: nothing sees it.

    Raises:
        ConfigError: the template does not mark each response once.
    """
    if len(blocks) != 2 * num_responses + 1:
        raise ConfigError(
            f"template: {name} marks {len(blocks) // 2} generations in a conversation of {num_responses} responses."
            " Put one {% generation %} around each response."
        )
    return list(zip(blocks[:-1:2], blocks[1::2], strict=True))
