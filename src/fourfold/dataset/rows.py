"""What every dataset format is turned into: rows of messages, before any tokenizer is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "function", "observation"]
"""`function` is an assistant turn that calls tools (its text is the JSON of the calls, or text around it);
`observation` is a tool's answer."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a message; only text today, so that other modalities can join without a rewrite."""

    text: str
    type: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, role: Role, text: str) -> Message:
        """A message of one text part."""
        return cls(role, (Part(text),))

    @property
    def text(self) -> str:
        """All text parts joined."""
        return self.parts[0].text if len(self.parts) == 1 else "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set.

    Attributes:
        messages: the prompt: turns in order, ending with a user or observation turn; earlier assistant turns
            are history. Empty for plain text.
        response: the answer to train on (the chosen one of a preference pair); None for plain text and for
            rows that only prompt.
        rejected: the worse answer of a preference pair.
        desirable: KTO's tag of `response`.
        system: the system prompt, "" if none.
        tools: JSON list of tool descriptions, "" if none.
        text: plain text for pre-training; None for conversations.
        leaves_out: whether the record has an answer that `text` does not have.
        source: the file or hub data set it came from, for messages.
        index: zero-based row within `source`.
    """

    messages: tuple[Message, ...] = ()
    response: Message | None = None
    rejected: Message | None = None
    desirable: bool | None = None
    system: str = ""
    tools: str = ""
    text: str | None = None
    leaves_out: bool = False
    source: str = ""
    index: int = 0
