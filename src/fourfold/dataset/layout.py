"""What a template puts around the messages of a conversation, rendered once for conversations of the same roles.

A body that does nothing with a message's content but insert it renders every conversation of the same roles, system
prompt and tools alike. Such a body is rendered with slots in place of the contents, and a conversation is laid out by
filling them; that is many times faster than rendering it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import nodes

from fourfold.dataset.segments import Segment


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment with slots.

    Attributes:
        texts: texts, and numbers of messages whose content stands there.
        trained: as in `Segment`.
    """

    texts: tuple[str | int, ...]
    trained: bool

    def fill(self, contents: Sequence[str]) -> Segment:
        """The segment of a conversation with these contents."""
        text = "".join([text if isinstance(text, str) else contents[text] for text in self.texts])
        return Segment(text, self.trained)


@dataclass(frozen=True, slots=True)
class Layout:
    """Pieces in blocks: prompt, response, prompt, ..., and what stands after the last response."""

    blocks: tuple[tuple[Piece | Segment, ...], ...]

    def fill(self, contents: Sequence[str]) -> list[list[Segment]]:
        """The segments of a conversation with these contents; those without text are left out."""
        filled = ([p if isinstance(p, Segment) else p.fill(contents) for p in block] for block in self.blocks)
        return [[segment for segment in block if segment.text] for block in filled]


def only_inserts_contents(node: nodes.Node, *, inserting: bool = False) -> bool:
    """Whether a body loops over `messages` as `message` and does nothing with a content but insert it.

    Args:
        node: of the parsed body.
        inserting: whether what the node gives is put into the text as it is.
    """
    match node:
        case nodes.Getattr(node=nodes.Name(name="message"), attr=attribute):
            return attribute == "role" or (attribute == "content" and inserting)
        case nodes.Name(name="message" | "messages"):
            return False
        case nodes.For(target=nodes.Name(name="message"), iter=nodes.Name(name="messages")):
            inner = [*node.body, *node.else_, *([] if node.test is None else [node.test])]
            return all(only_inserts_contents(child) for child in inner)
        case nodes.Output():
            inserting = True
        case nodes.Add() | nodes.Concat():
            pass
        case _:
            inserting = False
    return all(only_inserts_contents(child, inserting=inserting) for child in node.iter_child_nodes())
