"""The cells of the grid: every layout with every family, tuning, packing and stage, and how one is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness import STEPS, Case, Curve, gradient_limit, largest_of

from fourfold.planning.layout import Layout
from tiny_models import MOE_FAMILIES

LAYOUTS: dict[str, Layout] = {
    "ddp2": Layout(dp_replicate=2),
    **{f"zero{zero}-{ranks}": Layout(dp_shard=ranks, zero=zero) for zero in (1, 2, 3) for ranks in (2, 4)},
    "hsdp2x2": Layout(dp_replicate=2, dp_shard=2),
    "tp2": Layout(tp=2),
    "tp2-whole-positions": Layout(tp=2, sequence_parallel=False),
    "tp2-whole-logits": Layout(tp=2, loss_parallel=False),
    "tp4-kv2": Layout(tp=4),
    **{
        f"pp{ranks}-{schedule}": Layout(pp=ranks, pp_schedule=schedule)  # type: ignore[arg-type]
        for ranks in (2, 4)
        for schedule in ("gpipe", "1f1b", "interleaved_1f1b", "zbv")
    },
    **{
        f"cp{ranks}-{method}": Layout(cp=ranks, cp_method=method)  # type: ignore[arg-type]
        for ranks in (2, 4)
        for method in ("allgather", "ulysses", "ring")
    },
    "ep2": Layout(dp_shard=2, ep=2),
    "ep4": Layout(dp_shard=4, ep=4),
    "fsdp2xtp2": Layout(dp_shard=2, tp=2),
    "fsdp2xpp2": Layout(dp_shard=2, pp=2),
    "tp2xpp2": Layout(tp=2, pp=2),
    "cp2xfsdp2": Layout(cp=2, dp_shard=2),
    "cp2xtp2": Layout(cp=2, tp=2),
    "fsdp2xep2": Layout(dp_shard=4, ep=2),
    "ep2xpp2": Layout(dp_shard=2, ep=2, pp=2),
    "fsdp2xtp2xpp2": Layout(dp_shard=2, tp=2, pp=2),
}
FAMILIES = ("llama", "qwen3", "gemma3_text", "qwen3_moe")
TUNINGS = ("full", "lora", "qlora")
PACKINGS = ("packed", "padded")
STAGES = ("sft", "pt")

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.04,
}
"""Large enough for 4 ranks to share columns of 4-bit weights, which come in blocks of 64."""
_FAMILY_SHAPE: dict[str, dict[str, Any]] = {"gemma3_text": {"query_pre_attn_scalar": 64, "initializer_range": 0.3}}
"""Scores as mild as a trained model's, so that they do not magnify rounding."""


def _layers(layout: Layout) -> int:
    """As few as the layout's stages allow: rounding grows with depth."""
    stages = layout.pp * (2 if layout.pp_schedule in ("interleaved_1f1b", "zbv") else 1)
    return max(stages, 2)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the grid, by names."""

    layout: str
    family: str
    tuning: str
    packing: str
    stage: str

    def case(self) -> Case:
        """What is trained in this cell."""
        layers = {"num_hidden_layers": _layers(LAYOUTS[self.layout])}
        overrides = {**_SHAPE, **_FAMILY_SHAPE.get(self.family, {}), **layers}
        return Case(
            family=self.family,
            tuning=self.tuning,
            packed=self.packing == "packed",
            stage=self.stage,
            overrides=tuple(overrides.items()),
        )

    def reference(self) -> Case:
        """What it is compared with, in one process: padded rows, whatever the cell's own are."""
        return replace(self.case(), packed=False)

    def refusal(self) -> str | None:
        """Why there is nothing to run; None if there is."""
        if LAYOUTS[self.layout].ep > 1 and self.family not in MOE_FAMILIES:
            return "no experts"
        return None

    def as_dict(self) -> dict[str, str]:
        """For the results' file."""
        return asdict(self)


def all_cells() -> Iterator[Cell]:
    """Every cell, layout by layout."""
    for layout in LAYOUTS:
        for family in FAMILIES:
            for tuning in TUNINGS:
                for packing in PACKINGS:
                    for stage in STAGES:
                        yield Cell(layout, family, tuning, packing, stage)


def cover() -> Iterator[Cell]:
    """One cell for each layout, so chosen that every pair of family, tuning, packing and stage occurs."""
    for number, layout in enumerate(LAYOUTS):
        moe = LAYOUTS[layout].ep > 1
        family = "qwen3_moe" if moe else FAMILIES[number % len(FAMILIES)]
        turn = number // len(FAMILIES)
        tuning = TUNINGS[(number + turn) % len(TUNINGS)]
        yield Cell(layout, family, tuning, PACKINGS[turn % 2], STAGES[(turn // 2 + number) % 2])


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a curve is from its reference: losses absolute; norms relative; gradients relative to the largest."""

    loss: float
    norm: float
    gradient: float

    def problem(self, family: str, reference: Curve) -> str | None:
        """What is too far from the reference of a family; None if nothing is."""
        loss = 5e-5 if family in MOE_FAMILIES else 1e-5
        limits = {"loss": loss, "norm": 1e-3, "gradient": gradient_limit(self.gradient, reference)}
        found = asdict(self)
        # not (<=), so that a NaN is a problem
        return ", ".join(f"{key} {found[key]:.1e}" for key, limit in limits.items() if not found[key] <= limit) or None


def difference(curve: Curve, reference: Curve) -> Difference:
    """Compare a rank's curve; gradients of its own parameters and parts."""
    assert len(curve.losses) == len(reference.losses) == STEPS
    largest, gradient = largest_of(reference), 0.0
    for name, own in curve.gradients.items():
        whole = reference.gradients[name]
        expected = curve.shares[name].take(whole) if name in curve.shares else whole
        gradient = max(gradient, float((own - expected).abs().max()) / largest)
    return Difference(
        loss=max(abs(a - b) for a, b in zip(curve.losses, reference.losses, strict=True)),
        norm=max(abs(a - b) / b for a, b in zip(curve.norms, reference.norms, strict=True)),
        gradient=gradient,
    )
