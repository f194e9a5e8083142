"""Checks across keys, one small function each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fourfold.config.schema import Run

Verb = Literal["train", "chat", "export", "data"]


def contradictions(run: Run) -> Iterator[str]:
    """Problems that any verb would have."""
    yield from ()


def requirements(run: Run, verb: Verb) -> Iterator[str]:
    """What a verb needs beyond."""
    yield from ()
