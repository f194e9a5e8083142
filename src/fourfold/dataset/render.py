"""The one renderer: conversations to segments of text to token ids, the same for training and inference.

A segment is tokenised on its own, so a prompt has the same tokens whether an answer follows it or not. Chat, the API,
evaluation and export use this module too; nothing else turns messages into tokens.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fourfold.dataset.auto_template import AutoTemplate
from fourfold.dataset.export_template import export_template
from fourfold.dataset.marked_body import MarkedBody
from fourfold.dataset.reasoning import Thoughts
from fourfold.dataset.rows import Message
from fourfold.dataset.segments import (
    PROMPT_ROLES,
    RESPONSE_ROLES,
    ConversationRenderer,
    Segment,
    SegmentPair,
    check_alternation,
)
from fourfold.dataset.template import Template, load_template
from fourfold.dataset.tools import ToolCall, ToolFormat, load_tool_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "Segment", "Turn", "load_template"]


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
        today: the date told by tool formats and chat templates that state one; the present day if None.
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
        self._tool_format = tool_format
        self.enable_thinking, self.preserve_thinking = enable_thinking, preserve_thinking
        facts = template.facts
        self.default_system = facts.default_system if default_system is None else default_system
        self.today = today or datetime.datetime.now().astimezone().date()
        self.tools: ToolFormat = load_tool_format(tool_format or facts.tool_format, today=self.today)
        self._reasons = facts.reasoning
        self._thoughts = Thoughts(facts.thought_words, facts.empty_thought)
        self._conversation: ConversationRenderer
        if template.is_auto:
            forced = None if tool_format is None else self.tools
            self._conversation = AutoTemplate(
                template, tokenizer, forced, self.default_system, enable_thinking, self.today
            )
        else:
            self._conversation = MarkedBody(template, tokenizer, self.tools, self.default_system, self.today)

    def __reduce__(self) -> tuple[partial[Renderer], tuple[Template, PreTrainedTokenizerBase]]:
        # Compiled templates cannot be sent to another process; it compiles them anew.
        anew = partial(
            Renderer,
            tool_format=self._tool_format,
            default_system=self.default_system,
            enable_thinking=self.enable_thinking,
            preserve_thinking=self.preserve_thinking,
            today=self.today,
        )
        return anew, (self.template, self.tokenizer)

    @property
    def efficient_eos(self) -> bool:
        """Whether responses carry no end token (see TemplateFacts); such a template cannot train on prompts."""
        return self.template.facts.efficient_eos

    @property
    def closing_ids(self) -> tuple[int, ...]:
        """Token ids appended to a whole conversation for training, as input and label."""
        eos = self.tokenizer.eos_token_id
        return (eos,) if self.efficient_eos and isinstance(eos, int) else ()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a response, ascending."""
        eos = self.tokenizer.eos_token_id
        return tuple(sorted(self._conversation.turn_ends() | ({eos} if isinstance(eos, int) else set())))

    @property
    def chat_template(self) -> str:
        """The Jinja source to save with a model: transformers' `apply_chat_template` renders the same text with it."""
        if self.template.is_auto:
            return self.template.body
        return export_template(
            self.template,
            self.tools,
            default_system=self.default_system,
            enable_thinking=self.enable_thinking,
            preserve_thinking=self.preserve_thinking,
        )

    @property
    def fingerprint(self) -> str:
        """A hash of everything but the tokenizer that decides what is rendered; for the keys of caches."""
        told = "strftime_now" in self.template.body + self.tools.macros
        settings = [self.template.model_dump(), self.tools.macros, self.default_system, self.enable_thinking]
        settings += [self.preserve_thinking, self.today.isoformat() if told else ""]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def encode_turns(
        self, messages: Sequence[Message], system: str = "", tools: str = "", *, mask_history: bool = False
    ) -> list[Turn]:
        """The turns of a conversation of which every response is trained.

        Args:
            messages: user or observation turns and assistant or function turns in alternation, ending with a response.
            mask_history: only the last response will be trained, so the others stand as inference shows them: without
                thoughts (unless they are preserved).
        Raises:
            DataError: the roles do not alternate, or a function turn or the tools are not valid JSON.
            ConfigError: `auto`, and the chat template shows earlier turns otherwise when the conversation goes on.
        """
        turns = self.render_turns(messages, system, tools, mask_history=mask_history)
        return [self._encode_turn(turn, index) for index, turn in enumerate(turns)]

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
        return self._conversation.read_calls(self._thoughts.remove(text))

    def render_turns(
        self, messages: Sequence[Message], system: str, tools: str, *, mask_history: bool = False
    ) -> list[SegmentPair]:
        """The segments of prompt and response of each turn; see `encode_turns`."""
        check_alternation(messages, ends_with=RESPONSE_ROLES)
        as_history = mask_history and not self.preserve_thinking
        if self._reasons and self.enable_thinking is False:
            messages = self._without_thoughts(messages)
        elif self._reasons and as_history:
            messages = [*self._without_thoughts(messages[:-1]), messages[-1]]
        if mask_history and self.template.is_auto:
            # The chat template itself decides what it shows of history, be it otherwise than before.
            return [self._conversation.last_turn(messages, system, tools)]
        turns = self._conversation.turns(messages, system, tools)
        for number, turn in enumerate(turns):
            if not as_history or number == len(turns) - 1:
                self._open_thought(messages[2 * number + 1], turn)
        return turns

    def render_last_turn(self, messages: Sequence[Message], system: str, tools: str) -> SegmentPair:
        """The segments of the prompt and of the last response; see `encode_last_turn`."""
        check_alternation(messages, ends_with=RESPONSE_ROLES)
        last = messages[-1]
        if self._reasons and self.enable_thinking is False:
            (last,) = self._without_thoughts([last])
        turn = self._conversation.last_turn([*self._as_history(messages[:-1]), last], system, tools)
        self._open_thought(last, turn)
        return turn

    def render_prompt(self, messages: Sequence[Message], system: str, tools: str) -> list[Segment]:
        """The segments of a prompt; see `encode_prompt`."""
        check_alternation(messages, ends_with=PROMPT_ROLES)
        segments = self._conversation.prompt(self._as_history(messages), system, tools)
        if self._reasons and not self.enable_thinking:
            segments.append(Segment(self._thoughts.empty, trained=False))
        return segments

    def _as_history(self, messages: Sequence[Message]) -> Sequence[Message]:
        return self._without_thoughts(messages) if self._reasons and not self.preserve_thinking else messages

    def _without_thoughts(self, messages: Sequence[Message]) -> list[Message]:
        return [
            Message.of(message.role, self._thoughts.remove(message.text)) if message.role in RESPONSE_ROLES else message
            for message in messages
        ]

    def _open_thought(self, response: Message, turn: SegmentPair) -> None:
        """Give a response that does not think an empty thought: trained where thinking is on, else prompted."""
        if not self._reasons or self._thoughts.in_text(response.text):
            return
        if self.enable_thinking:
            turn[1].insert(0, Segment(self._thoughts.empty, trained=True))
        else:
            turn[0].append(Segment(self._thoughts.empty, trained=False))

    def _encode_turn(self, turn: SegmentPair, index: int) -> Turn:
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
