"""What is predicted of one layout: the memory of its most loaded rank, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fourfold.base.units import GIB
from fourfold.planning.job import EngineName, Recompute
from fourfold.planning.keeps import NOTHING, Keeps
from fourfold.planning.layout import Layout

TERMS = (
    "parameters",
    "scales",
    "gradients",
    "optimizer",
    "teacher",
    "gathered",
    "activations",
    "logits",
    "buffers",
    "context",
    "slack",
)
"""Terms of a rank's memory, in the order of a report.

scales: constants of packed weights. teacher: weights of a second model, with their constants. gathered: weights and
gradients of layers that FSDP has whole for a while, and copies in the compute dtype. buffers: what kernels and
collectives keep. context: of CUDA and its libraries, outside the allocator. slack: what the allocator has reserved and
cannot use.
"""

_HELD_SHARE = 0.01
"""Of what is allocated, what pages that are partly used add, even where the allocator gives back all it can: on an H100
a job ran with 98.6 % of the card allocated, the context with it, and another ran out of memory with 99.4 %."""


LOADED = ("parameters", "scales", "teacher", "context")
"""Terms of a rank's memory that are there once the model is loaded."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank, at its peak.

    Attributes:
        rank: the most loaded one.
        terms: bytes by TERMS.
        room: of the device, bytes; None where it is not known.
        joins_gradients: shards of gradients lie in the computing stream's memory (parallel/fsdp.py).
    """

    rank: int
    terms: dict[str, int] = field(hash=False)
    room: int | None = None
    joins_gradients: bool = False

    @property
    def allocated(self) -> int:
        """What the allocator has handed out (`max_memory_allocated`)."""
        return sum(self.terms.values()) - self.terms.get("context", 0) - self.terms.get("slack", 0)

    @property
    def reserved(self) -> int:
        """What the allocator holds (`max_memory_reserved`)."""
        return self.allocated + self.terms.get("slack", 0)

    @property
    def needed(self) -> int:
        """The least that a device must have: before it fails, the allocator gives back what it has free."""
        return int((1 + _HELD_SHARE) * self.allocated) + self.terms.get("context", 0)

    @property
    def device(self) -> int:
        """What the device's own tool shows; more than the device has if what is needed is."""
        shown = self.reserved + self.terms.get("context", 0)
        return shown if self.room is None or shown <= self.room else max(self.room, self.needed)


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of one optimizer step, seconds.

    Attributes:
        compute_s: of products and what lies between them, on the busiest rank.
        exposed_s: of communication that computation does not hide.
        bubble: share of the step that a pipeline's ranks idle.
        step_s: of the whole step.
        tokens_per_s: over all GPUs.
        mfu: model FLOPs (without recomputation) over the peak of the compute dtype.
        bytes_sent: by axis, bytes that one rank sends in a step.
    """

    compute_s: float
    exposed_s: float
    bubble: float
    step_s: float
    tokens_per_s: float
    mfu: float
    bytes_sent: dict[str, float] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A layout with everything that is predicted of it.

    Attributes:
        micro_batch: positions of a micro-batch on a data-parallel rank.
        reason: why it is what it is, one line.
        engine: what runs the layers.
        keeps: what is kept since there is room.
    """

    layout: Layout
    recompute: Recompute
    micro_batch: int
    memory: Memory
    cost: Cost
    reason: str = ""
    engine: EngineName = "eager"
    keeps: Keeps = NOTHING

    def as_json(self) -> dict[str, Any]:
        """One entry of `layouts` of `fourfold plan --json`."""
        layout = self.layout
        return {
            "layout": {
                **layout.sizes(),
                "zero": layout.zero,
                "pp_schedule": layout.pp_schedule,
                "offload": layout.offload,
                "recompute": self.recompute,
                "micro_batch": self.micro_batch,
                "engine": self.engine,
                "unpacked": self.keeps.unpacked,
                "keeps_logits": self.keeps.logits,
                "spared": self.keeps.spared,
                "keeps_copies": self.keeps.copies,
            },
            "memory_gib": {name: self.memory.terms.get(name, 0) / GIB for name in TERMS},
            "allocated_gib": self.memory.allocated / GIB,
            "reserved_gib": self.memory.reserved / GIB,
            "device_gib": self.memory.device / GIB,
            "step_s": self.cost.step_s,
            "tokens_per_s": self.cost.tokens_per_s,
            "mfu": self.cost.mfu,
            "bytes_sent": self.cost.bytes_sent,
            "bubble": self.cost.bubble,
            "reason": self.reason,
        }
