"""A conversation with a model: history, system prompt and tools around an engine."""

from __future__ import annotations

import json
from collections.abc import Generator

from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Message
from fourfold.dataset.tools import ToolCall
from fourfold.generate.interface import Engine, Sampling


class ChatSession:
    """Asks one question after the other and remembers what was said.

    Args:
        engine: generates the answers.
        renderer: the one that training used.
        system: system prompt; "" takes the renderer's default.
        tools: JSON list of tool descriptions, "" for none.

    Attributes:
        history: all turns so far, in alternation.
        calls: the tools that the last answer calls; empty if none. What is asked next is then their result.
    """

    def __init__(
        self, engine: Engine, renderer: Renderer, sampling: Sampling, *, system: str = "", tools: str = ""
    ) -> None:
        self._engine, self._renderer, self._sampling = engine, renderer, sampling
        self.system, self.tools = system, tools
        self.history: list[Message] = []
        self.calls: list[ToolCall] = []

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer, as pieces of text as they come.

        Closing the iterator early stops the answer and keeps what there is of it; a question without any answer is
        forgotten.

        Raises:
            ModelError: the conversation is longer than the model's context.
            DataError: the tools are not valid, or the template cannot render the conversation.
        """
        question = Message.of("observation" if self.calls else "user", text)
        prompt = self._renderer.encode_prompt([*self.history, question], self.system, self.tools)
        pieces: list[str] = []
        stream = self._engine.stream(prompt, self._sampling)
        try:
            for piece in stream:
                if piece:
                    pieces.append(piece)
                    yield piece
        finally:
            stream.close()
            if pieces:
                self._remember(question, "".join(pieces))

    def clear(self) -> None:
        """Forget the conversation; system prompt and tools stay."""
        self.history.clear()
        self.calls = []

    def _remember(self, question: Message, answer: str) -> None:
        self.calls = (self._renderer.parse_tool_calls(answer) or []) if self.tools else []
        self.history += [question, self._answer(answer)]

    def _answer(self, text: str) -> Message:
        if not self.calls:
            return Message.of("assistant", text)
        calls = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
        return Message.of("function", json.dumps(calls, ensure_ascii=False))
