"""Jobs whose speed and memory multi_gpu.py measures, as data.

A job runs on as many GPUs as its layout has ranks. What the issue asks of 8 is cut down for 2 and 4: layers left out,
shorter sequences, or bf16 masters, as the `note` tells. The most telling come first. Each is predicted to fit an
H100 of 79 GiB; activations are computed again only where they would not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fourfold.planning.layout import Layout

METHODS = ("allgather", "ulysses", "ring")
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv"]


@dataclass(frozen=True, slots=True)
class Speed:
    """A job whose speed and memory are measured.

    Attributes:
        model: folder of examples/models; layers: cut to so many, 0 for all.
        tuning: a name of rehearsed.py's TUNINGS; `pure` is full with bf16 masters. Layers run as they are unless it
            says `compiled` or `float8`.
        sequences: lengths of a micro-batch's documents on a data-parallel rank.
        batches: micro-batches of a step.
        note: how it is cut down from what it stands for.
        target: tokens/s of each GPU, from the issue; for 8, and for 4 where the same rows fit.
        spared: the last layers, of which nothing is computed again.
        unpacked: 4-bit weights are unpacked once and kept, as a run does where there is room.
        bubble: also find out what the pipeline idles, by passes of two lengths.
        seconds: that it is expected to take, loading included.
    """

    model: str
    tuning: Literal["full", "pure", "lora", "qlora", "full compiled", "full float8", "lora compiled", "qlora compiled"]
    layout: Layout
    recompute: Literal["none", "selective", "full"]
    sequences: tuple[int, ...]
    batches: int = 1
    layers: int = 0
    spared: int = 0
    unpacked: bool = False
    note: str = ""
    target: float | None = None
    bubble: bool = False
    seconds: float = 15.0

    @property
    def ranks(self) -> int:
        """GPUs that it runs on."""
        return self.layout.world_size


_8B, _70B, _30B = "Llama-3-8B", "Llama-3-70B", "Qwen3-30B-A3B"
_ROW = (8192,)


def _bubbles(layers: int, cuts: dict[Schedule, tuple[int, ...]], ranks: int) -> dict[str, Speed]:
    """8B LoRA in a pipeline by every schedule, stages cut to take equally long: the head is about 2.4 layers."""
    return {
        f"8b-lora-pp{ranks}-{schedule}": Speed(
            _8B,
            "lora",
            Layout(pp=ranks, pp_schedule=schedule, pp_layers=cut),
            "none",
            (4096,),
            2 * ranks,  # type: ignore[arg-type]
            note=f"stages of {', '.join(map(str, cut))} of {layers} layers",
            bubble=True,
            seconds=25,
        )
        for schedule, cut in cuts.items()
    }


_TWO: dict[str, Speed] = {
    "8b-lora-one": Speed(_8B, "lora", Layout(), "none", _ROW, note="one GPU: what weak scaling is held against"),
    "30b-16layers-lora-one": Speed(
        _30B, "lora compiled", Layout(), "none", (4096,) * 2, layers=16, note="16 of 48 layers, one GPU", seconds=50
    ),
    "8b-lora-ddp2": Speed(_8B, "lora", Layout(dp_replicate=2), "none", _ROW),
    "8b-lora-fsdp2": Speed(_8B, "lora", Layout(dp_shard=2), "none", _ROW),
    "8b-lora-tp2": Speed(_8B, "lora", Layout(tp=2), "none", _ROW),
    "8b-full-fsdp2": Speed(_8B, "pure", Layout(dp_shard=2), "selective", _ROW, note="all 32 layers, bf16 masters"),
    "8b-16layers-full-fsdp2": Speed(
        _8B, "full", Layout(dp_shard=2), "none", _ROW, layers=16, note="fp32 masters, 16 of 32 layers"
    ),
    "8b-16layers-full-fsdp2-compiled": Speed(
        _8B, "full compiled", Layout(dp_shard=2), "none", _ROW, layers=16, note="16 of 32 layers", seconds=40
    ),
    "8b-16layers-full-fsdp2-float8": Speed(
        _8B, "full float8", Layout(dp_shard=2), "none", _ROW, layers=16, note="16 of 32 layers", seconds=40
    ),
    "8b-lora-ddp2-compiled": Speed(_8B, "lora compiled", Layout(dp_replicate=2), "none", _ROW, seconds=40),
    "8b-lora-tp2-compiled": Speed(_8B, "lora compiled", Layout(tp=2), "none", _ROW, seconds=40),
    **_bubbles(
        32, {"1f1b": (17, 15), "zbv": (7, 9, 8, 8), "interleaved_1f1b": (9, 8, 8, 7), "gpipe": (17, 15)}, ranks=2
    ),
    "30b-8layers-full-ep2": Speed(
        _30B, "full", Layout(dp_shard=2, ep=2), "none", (4096,) * 2, layers=8, note="fp32 masters, 8 of 48 layers"
    ),
    "30b-8layers-full-ep2-compiled": Speed(
        _30B,
        "full compiled",
        Layout(dp_shard=2, ep=2),
        "none",
        (4096,) * 2,
        layers=8,
        note="8 of 48 layers",
        seconds=40,
    ),
    "30b-8layers-full-fsdp2": Speed(
        _30B, "full", Layout(dp_shard=2), "none", (4096,) * 2, layers=8, note="fp32 masters, 8 of 48 layers"
    ),
    **{
        f"8b-lora-32k-cp2-{method}": Speed(
            _8B,
            "lora",
            Layout(cp=2, cp_method=method, cp_shards=True),
            "full",
            (32768,),  # type: ignore[arg-type]
            note="32,768 of 131,072 tokens",
            seconds=25,
        )
        for method in ("ulysses", "ring", "allgather")
    },
    "8b-qlora-ddp2": Speed(_8B, "qlora", Layout(dp_replicate=2), "none", _ROW),
    "8b-qlora-tp2": Speed(_8B, "qlora", Layout(tp=2), "none", _ROW),
    "8b-16layers-full-tp2": Speed(
        _8B, "full", Layout(tp=2), "none", _ROW, layers=16, note="fp32 masters, 16 of 32 layers"
    ),
    "8b-16layers-full-pp2": Speed(
        _8B, "full", Layout(pp=2), "none", _ROW, 4, layers=16, note="fp32 masters, 16 of 32 layers"
    ),
    "30b-16layers-lora-ep2": Speed(
        _30B, "lora", Layout(dp_shard=2, ep=2), "none", (4096,) * 2, layers=16, note="16 of 48 layers"
    ),
    "70b-qlora-tp2": Speed(_70B, "qlora", Layout(tp=2), "full", (4096,), seconds=60),
    "70b-40layers-lora-fsdp2": Speed(
        _70B, "lora", Layout(dp_shard=2), "full", (4096,), layers=40, note="40 of 80 layers", seconds=60
    ),
}
_FOUR: dict[str, Speed] = {
    "8b-full-fsdp4": Speed(_8B, "full", Layout(dp_shard=4), "selective", _ROW),
    "8b-full-fsdp4-8k-compiled": Speed(_8B, "full compiled", Layout(dp_shard=4), "none", _ROW, target=9000, seconds=60),
    "8b-full-fsdp4-8k-float8": Speed(_8B, "full float8", Layout(dp_shard=4), "none", _ROW, target=11000, seconds=60),
    "8b-lora-ddp4-compiled": Speed(_8B, "lora compiled", Layout(dp_replicate=4), "none", _ROW, seconds=40),
    "8b-full-fsdp2-tp2": Speed(_8B, "full", Layout(dp_shard=2, tp=2), "none", _ROW),
    "8b-full-pp2-fsdp2": Speed(_8B, "full", Layout(pp=2, dp_shard=2), "full", _ROW, 4),
    "8b-lora-ddp4": Speed(_8B, "lora", Layout(dp_replicate=4), "none", _ROW),
    "8b-lora-fsdp4": Speed(_8B, "lora", Layout(dp_shard=4), "none", _ROW),
    "8b-lora-tp4": Speed(_8B, "lora", Layout(tp=4), "none", _ROW),
    "8b-lora-tp4-compiled": Speed(_8B, "lora compiled", Layout(tp=4), "none", _ROW, seconds=40),
    "8b-qlora-tp4-compiled": Speed(_8B, "qlora compiled", Layout(tp=4), "none", _ROW, seconds=45),
    "8b-qlora-tp4-unpacked-compiled": Speed(
        _8B, "qlora compiled", Layout(tp=4), "none", _ROW, unpacked=True, seconds=45
    ),
    "8b-full-fsdp2-tp2-compiled": Speed(_8B, "full compiled", Layout(dp_shard=2, tp=2), "none", _ROW, seconds=45),
    **_bubbles(
        32,
        {
            "1f1b": (9, 9, 8, 6),
            "interleaved_1f1b": (5, 4, 4, 4, 4, 4, 4, 3),
            "zbv": (3, 4, 5, 4, 4, 4, 5, 3),
            "gpipe": (9, 9, 8, 6),
        },
        ranks=4,
    ),
    "70b-lora-fsdp4-8k-compiled": Speed(
        _70B,
        "lora compiled",
        Layout(dp_shard=4),
        "full",
        _ROW,
        spared=6,
        note="6 of 80 layers not computed again, as a run without `recompute` chooses",
        target=1200,
        seconds=100,
    ),
    "30b-16layers-full-fsdp4-compiled": Speed(
        _30B, "full compiled", Layout(dp_shard=4), "none", (4096,) * 2, layers=16, note="16 of 48 layers", seconds=50
    ),
    "30b-16layers-full-ep4-compiled": Speed(
        _30B,
        "full compiled",
        Layout(dp_shard=4, ep=4),
        "none",
        (4096,) * 2,
        layers=16,
        note="16 of 48 layers",
        seconds=50,
    ),
    "30b-16layers-lora-ep4-compiled": Speed(
        _30B,
        "lora compiled",
        Layout(dp_shard=4, ep=4),
        "none",
        (4096,) * 2,
        layers=16,
        note="16 of 48 layers",
        seconds=50,
    ),
    "70b-lora-fsdp4": Speed(_70B, "lora", Layout(dp_shard=4), "full", (4096,), seconds=60),
    "70b-qlora-fsdp4": Speed(_70B, "qlora", Layout(dp_shard=4), "full", (4096,), seconds=60),
    "70b-qlora-fsdp2-tp2": Speed(_70B, "qlora", Layout(dp_shard=2, tp=2), "full", (4096,), seconds=60),
    "30b-16layers-full-ep4": Speed(
        _30B,
        "full",
        Layout(dp_shard=4, ep=4),
        "selective",
        (4096,) * 2,
        layers=16,
        note="fp32 masters, 16 of 48 layers",
    ),
    "30b-16layers-full-fsdp4": Speed(
        _30B, "full", Layout(dp_shard=4), "selective", (4096,) * 2, layers=16, note="fp32 masters, 16 of 48 layers"
    ),
    **{
        f"8b-lora-64k-cp4-{method}": Speed(
            _8B,
            "lora",
            Layout(cp=4, cp_method=method, cp_shards=True),
            "full",
            (65536,),  # type: ignore[arg-type]
            note="65,536 of 131,072 tokens",
            seconds=40,
        )
        for method in METHODS
    },
    "8b-qlora-ddp4": Speed(_8B, "qlora", Layout(dp_replicate=4), "none", _ROW),
    "8b-qlora-tp4": Speed(_8B, "qlora", Layout(tp=4), "none", _ROW),
}
_INTERLEAVED = _FOUR["8b-lora-pp4-interleaved_1f1b"]
_FOUR["8b-lora-pp4-interleaved_1f1b-one-group"] = replace(
    _INTERLEAVED,
    layout=replace(_INTERLEAVED.layout, pp_overlap_p2p=False),
    note=f"{_INTERLEAVED.note}; all sends and receives in one group",
)
_FOUR |= {
    f"{name}-compiled": replace(_FOUR[name], tuning="lora compiled", seconds=60)
    for name in (
        "8b-lora-pp4-1f1b",
        "8b-lora-pp4-interleaved_1f1b",
        *(f"8b-lora-64k-cp4-{method}" for method in METHODS),
    )
}
_FOUR |= {
    f"8b-lora-128k-cp4-{method}-compiled": replace(
        _FOUR[f"8b-lora-64k-cp4-{method}-compiled"],
        sequences=(131072,),  # type: ignore[arg-type]
        note="",
        seconds=120,
    )
    for method in ("allgather", "ulysses")
}
_FOUR |= {
    f"70b-40layers-lora-{name}-compiled": Speed(
        _70B,
        "lora compiled",
        layout,
        "none",
        (2048,),
        batches,
        layers=40,
        note="40 of 80 layers, 16 rows of 2,048 a step, for the choice between shards and stages",
        seconds=60,
    )
    for name, layout, batches in (
        ("pp4-1f1b", Layout(pp=4, pp_layers=(10, 10, 10, 10)), 16),
        ("fsdp4", Layout(dp_shard=4), 4),
    )
}
_EIGHT: dict[str, Speed] = {
    "8b-full-fsdp8": Speed(_8B, "full", Layout(dp_shard=8), "selective", _ROW, target=9000),
    "8b-full-fsdp8-compiled": Speed(_8B, "full compiled", Layout(dp_shard=8), "none", _ROW, target=9000, seconds=50),
    "8b-full-fsdp8-float8": Speed(_8B, "full float8", Layout(dp_shard=8), "none", _ROW, target=11000, seconds=50),
    "8b-full-fsdp8-4k": Speed(_8B, "full", Layout(dp_shard=8), "none", (4096,), note="sequences of 4,096", target=9000),
    "8b-full-fsdp4-tp2": Speed(_8B, "full", Layout(dp_shard=4, tp=2), "none", _ROW),
    "8b-full-pp2-fsdp4": Speed(_8B, "full", Layout(pp=2, dp_shard=4), "selective", _ROW, 4),
    **{
        f"8b-full-pp4-fsdp2-{schedule}": Speed(
            _8B,
            "full",
            Layout(pp=4, dp_shard=2, pp_schedule=schedule),
            "full",
            (4096,),
            8,  # type: ignore[arg-type]
            bubble=True,
            seconds=30,
        )
        for schedule in ("1f1b", "interleaved_1f1b", "zbv")
    },
    "8b-lora-ddp8": Speed(_8B, "lora", Layout(dp_replicate=8), "none", _ROW),
    "8b-lora-fsdp8": Speed(_8B, "lora", Layout(dp_shard=8), "none", _ROW),
    "8b-lora-tp8": Speed(_8B, "lora", Layout(tp=8), "none", _ROW),
    "70b-lora-fsdp8": Speed(_70B, "lora", Layout(dp_shard=8), "full", _ROW, target=1200, seconds=60),
    "70b-lora-tp8": Speed(_70B, "lora", Layout(tp=8), "full", _ROW, seconds=60),
    "70b-lora-fsdp4-tp2": Speed(_70B, "lora", Layout(dp_shard=4, tp=2), "full", _ROW, seconds=60),
    "30b-full-ep8": Speed(
        _30B, "pure", Layout(dp_shard=8, ep=8), "full", (8192,), note="bf16 masters", target=12000, seconds=40
    ),
    "30b-lora-ep8": Speed(_30B, "lora", Layout(dp_shard=8, ep=8), "full", _ROW, target=12000, seconds=40),
    "30b-lora-fsdp8": Speed(_30B, "lora", Layout(dp_shard=8), "full", _ROW, seconds=40),
    **{
        f"8b-lora-128k-cp8-{method}": Speed(
            _8B,
            "lora",
            Layout(cp=8, cp_method=method, cp_shards=True),
            "full",
            (131072,),  # type: ignore[arg-type]
            seconds=60,
        )
        for method in METHODS
    },
    "8b-qlora-ddp8": Speed(_8B, "qlora", Layout(dp_replicate=8), "none", _ROW),
    "8b-qlora-fsdp8": Speed(_8B, "qlora", Layout(dp_shard=8), "none", _ROW),
    "8b-qlora-tp8": Speed(_8B, "qlora", Layout(tp=8), "none", _ROW),
    "70b-qlora-fsdp8": Speed(_70B, "qlora", Layout(dp_shard=8), "full", _ROW, seconds=60),
    "70b-qlora-tp8": Speed(_70B, "qlora", Layout(tp=8), "full", _ROW, seconds=60),
    "70b-qlora-fsdp4-tp2": Speed(_70B, "qlora", Layout(dp_shard=4, tp=2), "full", _ROW, seconds=60),
}
SPEEDS: dict[str, Speed] = {**_TWO, **_FOUR, **_EIGHT}
"""By name; those of one rank run on any number of GPUs."""


def speed_cases(ranks: int) -> list[str]:
    """Names `throughput/RANKS/CASE`."""
    return [f"throughput/{ranks}/{name}" for name, case in SPEEDS.items() if case.ranks in (1, ranks)]
