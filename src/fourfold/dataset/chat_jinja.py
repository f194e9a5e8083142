"""The sandboxed Jinja environment in which chat templates and tool formats are rendered.

It behaves as the one transformers' `apply_chat_template` uses (same whitespace rules, `tojson`, `raise_exception`,
`strftime_now`) and knows two more tags, which leave marks in the rendered text:

- `{% generation %}...{% endgeneration %}`: what the model writes and is trained on;
- `{% cut %}`: text before and after is tokenised apart.

Marks are strings that occur in no input of the rendering, so a user's text can never be taken for one.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_OPEN, _CLOSE, _CUT = "_mark_open", "_mark_close", "_mark_cut"


class _MarkExtension(Extension):
    """Parses the tags `generation` and `cut` into the output of variables that hold the marks."""

    tags = {"generation", "cut"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        token = next(parser.stream)
        if token.value == "cut":
            return self._output(_CUT, token.lineno)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [self._output(_OPEN, token.lineno), *body, self._output(_CLOSE, token.lineno)]

    @staticmethod
    def _output(name: str, lineno: int) -> nodes.Output:
        return nodes.Output([nodes.Name(name, "load", lineno=lineno)], lineno=lineno)


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks of one rendering."""

    open: str
    close: str
    cut: str
    bos: str
    eos: str

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> Marks:
        """Marks that occur in none of `texts`."""
        joined, number = "\x1e".join(texts), 0
        while f"\x1d{number}\x1f" in joined:
            number += 1
        return cls(*(f"\x1d{number}\x1f{kind}\x1d" for kind in ("open", "close", "cut", "bos", "eos")))

    def variables(self) -> dict[str, str]:
        """What the tags of a template expect to find in its context."""
        return {_OPEN: self.open, _CLOSE: self.close, _CUT: self.cut}

    def slot(self, number: int) -> str:
        """A mark for the content of message `number`."""
        return self.cut.replace("cut", f"slot{number}")

    def split_slots(self, text: str) -> tuple[str | int, ...]:
        """A text cut at its slots, which become the numbers of their messages."""
        before, after = map(re.escape, self.cut.split("cut"))
        parts = re.split(f"{before}slot([0-9]+){after}", text)
        mixed = (int(part) if place % 2 else part for place, part in enumerate(parts))
        return tuple(part for part in mixed if part != "")

    def split(self, rendered: str) -> list[str]:
        """The rendered text cut at its marks; the marks are items of their own, empty texts are left out."""
        pattern = "|".join(re.escape(mark) for mark in (self.open, self.close, self.cut, self.bos, self.eos))
        return [item for item in re.split(f"({pattern})", rendered) if item]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def chat_environment(today: datetime.date | None = None) -> ImmutableSandboxedEnvironment:
    """A new environment.

    Args:
        today: the date that `strftime_now` tells; the present moment if None.
    """

    def strftime_now(pattern: str) -> str:
        return (today or datetime.datetime.now().astimezone()).strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_MarkExtension, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    functions: Mapping[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": strftime_now}
    environment.globals.update(functions)
    return environment
