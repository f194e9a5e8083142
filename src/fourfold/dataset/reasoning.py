"""Thoughts of reasoning models: found, removed and left empty."""

from __future__ import annotations

import re


class Thoughts:
    """What a thought looks like in a template's text.

    Args:
        words: what a thought begins and ends with.
        empty: an empty thought; the two words together if None.
    """

    def __init__(self, words: tuple[str, str], empty: str | None = None) -> None:
        self.words = words
        self.empty = "".join(words) if empty is None else empty
        self._pattern = re.compile(f"{re.escape(words[0])}.*?{re.escape(words[1])}", re.DOTALL)

    def remove(self, text: str) -> str:
        """The text without its thoughts and without the line breaks they leave at the front."""
        return self._pattern.sub("", text).lstrip("\n")

    def in_text(self, text: str) -> bool:
        """Whether the text thinks, be it only that one of the two words occurs."""
        return any(word.strip() in text for word in self.words)
