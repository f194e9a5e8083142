"""The type of a key, in the words of its user."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

_WORDS: Mapping[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


@dataclass(frozen=True, slots=True)
class Kind:
    """What values a key takes.

    Attributes:
        types: any of bool, int, float, str, tuple (a list) and dict (a mapping).
        values: the closed list of values; empty if there is none.
        nullable: whether null is a value.
    """

    types: frozenset[Any]
    values: tuple[Any, ...]
    nullable: bool

    @classmethod
    def of(cls, annotation: Any) -> Kind:
        """Read the annotation of a field."""
        found: set[Any] = set()
        choices: list[Any] = []
        nullable = False
        for member in _members(annotation):
            origin = typing.get_origin(member)
            if member is type(None):
                nullable = True
            elif origin is Literal:
                values = typing.get_args(member)
                choices += values
                found |= {type(value) for value in values}
            elif origin is tuple:
                found.add(tuple)
            elif origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
                found.add(dict)
            else:
                found.add(member)
        return cls(frozenset(found), tuple(choices), nullable)

    @property
    def choices(self) -> tuple[str, ...]:
        """The closed list of values as text."""
        return tuple(str(value) for value in self.values)

    @property
    def is_flag(self) -> bool:
        """Whether `--key` alone means true."""
        return bool in self.types

    @property
    def takes_text(self) -> bool:
        """Whether any text is a value."""
        return str in self.types and not self.choices

    def words(self) -> str:
        """The type in plain words, null left out."""
        parts = [_WORDS[kind] for kind in (bool, int, float, str) if kind in self.types and not self._chosen(kind)]
        if int in self.types and float in self.types:
            parts.remove("an integer")
        if tuple in self.types:
            parts.append("a comma-separated list")
        if dict in self.types:
            parts.append("a mapping")
        if self.choices:
            parts.insert(0, "one of " + ", ".join(self.choices))
        if Any in self.types:
            parts.append("text or a mapping")
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]

    def _chosen(self, kind: type) -> bool:
        return bool(self.choices) and kind in (str, int)


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]
