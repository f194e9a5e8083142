"""What the allocator reserves beyond what it has handed out: fragments, and memory that other streams cannot use.

PyTorch's allocator gives memory to the stream that asks, and keeps it for that stream. FSDP gathers on a stream of its
own and leaves the shards of gradients on another, unless they are told to lie with the rest (parallel/fsdp.py); so a
rank reserves the most that each of them ever held, which they do not hold at the same time. Within a stream, growing
segments (`expandable_segments`, which the command sets) leave few holes: about as much as the largest blocks that come
and go.

Measured on an H100 over the points of `benchmarks/memory_grid.py`, stream by stream.
"""

from __future__ import annotations

from dataclasses import dataclass

_LOGITS_SHARE = 0.65
"""Of one chunk's logits in fp32, what stays unusable between the blocks of loss and gradient."""
_GROWN_SHARE = 0.02
"""Of all that comes and goes, what rounding to whole pages and small holes take."""
_LEAST_SLACK = 120 << 20
"""What is unusable in any case: a started page of each size and stream."""

_FEW_GRADIENTS = 1 << 28
"""Bytes of shards of gradients that are not worth anything but PyTorch's own way."""


def gradients_may_join(shards: int, root: int) -> bool:
    """Whether shards of gradients may lie in the computing stream's memory, which activations can use before they come.

    The largest block that a backward pass asks for, at its end, is the gradient of embedding and head as it is sent;
    shards that came before it lie where it would have found room. One H100, a rank of 4 to 64: up to 4.1 GiB less
    reserved where the shards are at least half as large as that block, and up to 3.0 GiB more where they are not.

    Args:
        shards: bytes of all shards of gradients of a rank.
        root: bytes of the whole gradients of what is outside the layers.
    """
    return shards >= max(root // 2, _FEW_GRADIENTS)


@dataclass(frozen=True, slots=True)
class Pools:
    """Bytes of a rank, by who asks the allocator.

    Attributes:
        moving: the most that the computing stream holds at a time of what comes and goes.
        gathering: the most that FSDP's gathering stream holds: the root and two units as they arrive, and shards as
            they are sent.
        reduced: shards of gradients, where they lie on the reducing stream.
        logits: of one chunk, fp32.
        largest: the largest block that the backward pass makes anew: a gradient, or a unit's, laid out to be sent.
    """

    moving: int
    gathering: int
    reduced: int
    logits: int
    largest: int

    def reserved(self, lasting: int) -> int:
        """What all streams have at the end of a step.

        Args:
            lasting: bytes of what stays, which the computing stream holds beside: weights and optimizer state.
        """
        holes = _LEAST_SLACK + self.largest + int(_LOGITS_SHARE * self.logits + _GROWN_SHARE * self.moving)
        return lasting + self.moving + self.gathering + self.reduced + holes
