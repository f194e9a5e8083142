"""The one renderer: conversations to segments of text to token ids, the same for training and inference.

A segment is tokenised on its own, so a prompt has the same tokens whether an answer follows it or not. Chat, the API,
evaluation and export use this module too; nothing else turns messages into tokens.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.chat_jinja import Marks, chat_environment
from fourfold.dataset.reasoning import Thoughts
from fourfold.dataset.rows import Message
from fourfold.dataset.template import Template
from fourfold.dataset.tools import ToolCall, ToolFormat, load_tool_format, parse_function_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_ROLES = ("user", "observation")
_RESPONSE_ROLES = ("assistant", "function")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation that is tokenised on its own.

    Attributes:
        text: as it reads.
        trained: whether the model writes it.
        token_id: its one token where it stands for a special token of the tokenizer; None to tokenise the text.
    """

    text: str
    trained: bool
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and the response to it.

    Attributes:
        prompt_ids: token ids of everything between the response before and this one.
        response_ids: token ids that the model writes; they are their own labels.
        prompt_label: the label of the first prompt token where it differs from the input: the end-of-sequence of the
            response before, in templates with an efficient end-of-sequence. None elsewhere.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    prompt_label: int | None = None


class Renderer:
    """Renders conversations with one template for one tokenizer.

    Args:
        template: from `load_template`.
        tokenizer: with its special tokens already settled (see `special_tokens.settle_special_tokens`).
        tool_format: takes the place of the template's own.
        default_system: takes the place of the template's own.
        enable_thinking: True trains and invites thoughts; False removes them and prompts with an empty thought; None
            keeps the thoughts there are and prompts with an empty thought where there is none. Only reasoning
            templates look at it.
        preserve_thinking: keep the thoughts of earlier turns, which are otherwise removed as inference does.
        today: the date that tool formats and chat templates tell which state one; the present day if None.
    Raises:
        ConfigError: unknown tool format.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tool_format: str | None = None,
        default_system: str | None = None,
        enable_thinking: bool | None = True,
        preserve_thinking: bool = False,
        today: datetime.date | None = None,
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.enable_thinking, self.preserve_thinking = enable_thinking, preserve_thinking
        facts = template.facts
        self.default_system = facts.default_system if default_system is None else default_system
        self.tools: ToolFormat = load_tool_format(tool_format or facts.tool_format, today=today)
        self._function_role = "assistant" if self.tools.name != facts.tool_format else "function"
        self._thoughts = Thoughts(facts.thought_words, facts.empty_thought)
        self._jinja = chat_environment(today).from_string(template.body)

    @property
    def efficient_eos(self) -> bool:
        """Whether responses carry no end token of their own (see TemplateFacts); such a template cannot train on
        prompts."""
        return self.template.facts.efficient_eos

    @property
    def closing_ids(self) -> tuple[int, ...]:
        """Token ids appended to a whole conversation for training, as input and label."""
        eos = self.tokenizer.eos_token_id
        return (eos,) if self.efficient_eos and isinstance(eos, int) else ()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a response, ascending."""
        known = self.tokenizer.get_vocab()
        found = {known[word] for word in self.template.facts.stop_words if word in known}
        eos = self.tokenizer.eos_token_id
        return tuple(sorted(found | ({eos} if isinstance(eos, int) else set())))

    def encode_turns(
        self, messages: Sequence[Message], system: str = "", tools: str = "", *, mask_history: bool = False
    ) -> list[Turn]:
        """The turns of a conversation of which every response is trained.

        Args:
            messages: user or observation turns and assistant or function turns in alternation, ending with a response.
            mask_history: only the last response will be trained, so the others stand as inference shows them: without
                thoughts (unless they are preserved).
        Raises:
            DataError: the roles do not alternate, a function turn or the tools are not valid JSON.
        """
        return [
            self._encode_turn(turn, index)
            for index, turn in enumerate(self.render_turns(messages, system, tools, mask_history=mask_history))
        ]

    def encode_last_turn(self, messages: Sequence[Message], system: str = "", tools: str = "") -> Turn:
        """The last response, and everything before it as its prompt, as inference shows it.

        Raises:
            DataError: as `encode_turns`.
        """
        return self._encode_turn(self.render_last_turn(messages, system, tools), 0)

    def encode_prompt(self, messages: Sequence[Message], system: str = "", tools: str = "") -> list[int]:
        """The token ids after which the model writes its answer.

        Args:
            messages: as for `encode_turns`, but ending with a user or observation turn.
        Raises:
            DataError: as `encode_turns`.
        """
        return self._encode(self.render_prompt(messages, system, tools))

    def render_text(
        self, messages: Sequence[Message], system: str = "", tools: str = "", *, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text, as inference shows it.

        Raises:
            DataError: as `encode_turns`.
        """
        if add_generation_prompt:
            return "".join(segment.text for segment in self.render_prompt(messages, system, tools))
        prompt, response = self.render_last_turn(messages, system, tools)
        return "".join(segment.text for segment in (*prompt, *response))

    def parse_tool_calls(self, text: str) -> list[ToolCall] | None:
        """The tool calls in what the model wrote; None if it calls none."""
        return self.tools.read(text)

    def render_turns(
        self, messages: Sequence[Message], system: str, tools: str, *, mask_history: bool = False
    ) -> list[tuple[list[Segment], list[Segment]]]:
        """The segments of prompt and response of each turn; see `encode_turns`."""
        _check_alternation(messages, ends_with=_RESPONSE_ROLES)
        mask_history = mask_history and not self.preserve_thinking
        last, contents = len(messages) - 1, [message.text for message in messages]
        if self.template.facts.reasoning:
            for index in range(1, len(messages), 2):
                if self.enable_thinking is False or (mask_history and index != last):
                    contents[index] = self._thoughts.remove(contents[index])
        turns = self._render_pairs(messages, contents, system, tools)
        for number, (prompt, response) in enumerate(turns):
            if not mask_history or number == len(turns) - 1:
                self._open_thought(contents[2 * number + 1], prompt, response)
        return turns

    def render_last_turn(
        self, messages: Sequence[Message], system: str, tools: str
    ) -> tuple[list[Segment], list[Segment]]:
        """The segments of the prompt and of the last response; see `encode_last_turn`."""
        _check_alternation(messages, ends_with=_RESPONSE_ROLES)
        contents = [*self._as_history(messages[:-1]), messages[-1].text]
        if self.template.facts.reasoning and self.enable_thinking is False:
            contents[-1] = self._thoughts.remove(contents[-1])
        turns = self._render_pairs(messages, contents, system, tools)
        prompt = [segment for pair in turns[:-1] for part in pair for segment in part] + turns[-1][0]
        self._open_thought(contents[-1], prompt, turns[-1][1])
        return prompt, turns[-1][1]

    def render_prompt(self, messages: Sequence[Message], system: str, tools: str) -> list[Segment]:
        """The segments of a prompt; see `encode_prompt`."""
        _check_alternation(messages, ends_with=_PROMPT_ROLES)
        blocks = self._render(messages, self._as_history(messages), system, tools, add_generation_prompt=True)
        segments = [segment for block in blocks for segment in block]
        if self.template.facts.reasoning and not self.enable_thinking:
            segments.append(Segment(self._thoughts.empty, trained=False))
        return segments

    def _as_history(self, messages: Sequence[Message]) -> list[str]:
        if not self.template.facts.reasoning or self.preserve_thinking:
            return [message.text for message in messages]
        return [self._thoughts.remove(m.text) if m.role in _RESPONSE_ROLES else m.text for m in messages]

    def _open_thought(self, content: str, prompt: list[Segment], response: list[Segment]) -> None:
        """Give a response that does not think an empty thought: trained where thinking is on, else prompted."""
        if not self.template.facts.reasoning or self._thoughts.in_text(content):
            return
        if self.enable_thinking:
            response.insert(0, Segment(self._thoughts.empty, trained=True))
        else:
            prompt.append(Segment(self._thoughts.empty, trained=False))

    def _render_pairs(
        self, messages: Sequence[Message], contents: Sequence[str], system: str, tools: str
    ) -> list[tuple[list[Segment], list[Segment]]]:
        blocks = self._render(messages, contents, system, tools)
        if len(blocks) != len(messages) + 1:
            raise ConfigError(
                f"template: {self.template.name} marks {len(blocks) // 2} generations in a conversation of"
                f" {len(messages) // 2} responses. Put one {{% generation %}} around each response."
            )
        # What stands after the last response is neither trained nor seen by it.
        return list(zip(blocks[:-1:2], blocks[1::2], strict=True))

    def _render(
        self,
        messages: Sequence[Message],
        contents: Sequence[str],
        system: str,
        tools: str,
        *,
        add_generation_prompt: bool = False,
    ) -> list[list[Segment]]:
        """The segments in blocks: prompt, response, prompt, ..., and what stands after the last response."""
        shown = [self._show(message, content) for message, content in zip(messages, contents, strict=True)]
        prompt = system or self.default_system
        full_system = prompt + self.tools.describe(tools) if tools else prompt or None
        marks = Marks.absent_from([full_system or "", self.template.body, *(entry["content"] for entry in shown)])
        try:
            rendered = self._jinja.render(
                messages=shown,
                system=full_system,
                bos_token=marks.bos,
                eos_token=marks.eos,
                add_generation_prompt=add_generation_prompt,
                **marks.variables(),
            )
        except TemplateError as error:
            raise DataError(f"template: {self.template.name} cannot render this conversation: {error}.") from error
        return self._blocks(marks, rendered)

    def _show(self, message: Message, content: str) -> dict[str, Any]:
        if message.role != "function":
            return {"role": message.role, "content": content}
        facts = self.template.facts
        before, calls = parse_function_turn(
            content, thought_words=facts.thought_words, tool_call_words=facts.tool_call_words
        )
        return {"role": self._function_role, "content": before + self.tools.write(calls)}

    def _blocks(self, marks: Marks, rendered: str) -> list[list[Segment]]:
        special = {
            marks.bos: (self.tokenizer.bos_token, self.tokenizer.bos_token_id),
            marks.eos: (self.tokenizer.eos_token, self.tokenizer.eos_token_id),
        }
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

    def _encode_turn(self, turn: tuple[list[Segment], list[Segment]], index: int) -> Turn:
        eos = self.tokenizer.eos_token_id
        label = eos if index > 0 and self.efficient_eos and isinstance(eos, int) else None
        return Turn(self._encode(turn[0]), self._encode(turn[1]), label)

    def _encode(self, segments: Iterable[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if segment.token_id is not None:
                ids.append(segment.token_id)
            else:
                ids += self.tokenizer.encode(segment.text, add_special_tokens=False)
        return ids


def _check_alternation(messages: Sequence[Message], *, ends_with: tuple[str, ...]) -> None:
    for index, message in enumerate(messages):
        expected = _RESPONSE_ROLES if index % 2 else _PROMPT_ROLES
        if message.role not in expected:
            raise DataError(
                f"messages: turn {index + 1} has the role {message.role!r} where {' or '.join(expected)} must stand."
                " Let user and assistant turns alternate, beginning with the user's."
            )
    if not messages or messages[-1].role not in ends_with:
        found = repr(messages[-1].role) if messages else "nothing"
        raise DataError(
            f"messages: the conversation ends with {found}, not with {' or '.join(ends_with)}. Cut it there."
        )
