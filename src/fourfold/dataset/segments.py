"""Pieces of a rendered conversation, and what can render one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fourfold.base.errors import DataError
from fourfold.dataset.rows import Message
from fourfold.dataset.tools import ToolCall

PROMPT_ROLES = ("user", "observation")
RESPONSE_ROLES = ("assistant", "function")


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


SegmentPair = tuple[list[Segment], list[Segment]]
"""The segments of a prompt and of the response to it."""


class ConversationRenderer(Protocol):
    """Renders conversations whose roles have been checked; thoughts are the caller's business."""

    def turns(self, messages: Sequence[Message], system: str, tools: str) -> list[SegmentPair]:
        """Every turn of a conversation that ends with a response."""
        ...

    def last_turn(self, messages: Sequence[Message], system: str, tools: str) -> SegmentPair:
        """The last response of a conversation, and everything before it as its prompt."""
        ...

    def prompt(self, messages: Sequence[Message], system: str, tools: str) -> list[Segment]:
        """A conversation that ends with a prompt, and the opening of the response."""
        ...

    def read_calls(self, text: str) -> list[ToolCall] | None:
        """The tool calls in a response; None if there are none."""
        ...

    def turn_ends(self) -> set[int]:
        """The tokens that end a response, besides the tokenizer's end-of-sequence."""
        ...


def join_turns(turns: Sequence[SegmentPair]) -> SegmentPair:
    """All turns as the last one, with what is before its response as the prompt."""
    earlier = [segment for pair in turns[:-1] for part in pair for segment in part]
    return earlier + turns[-1][0], turns[-1][1]


def check_alternation(messages: Sequence[Message], *, ends_with: tuple[str, ...]) -> None:
    """Check that prompts and responses alternate, beginning with a prompt.

    Raises:
        DataError: they do not, or the last role is not one of `ends_with`.
    """
    for index, message in enumerate(messages):
        expected = RESPONSE_ROLES if index % 2 else PROMPT_ROLES
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
