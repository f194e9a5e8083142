"""Layouts whose losses multi_gpu.py compares, and what is trained under them, as data.

A layout runs on as many GPUs as it has ranks: each axis by itself on 2, 4 and 8, pairs on 4 and 8, triples on 8. The
most telling variants come first, since a call's time may end before the table does.

What is held against one GPU: in fp32 every loss within 1e-5 (at losses of 6 to 8) and every gradient norm within 1e-3
of itself, as in tests/parallel: layouts sum in other orders, and AdamW magnifies the last digits of gradients near 0.
In bf16, whose numbers are 0.4 % apart, the mean over the steps within 2e-3, twice what CPU processes were found to
differ by; a single loss tells less. Weights are drawn wide enough for what attention sees to be seen in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fourfold.planning.layout import Layout
from fourfold.planning.stages import num_stages

Precision = Literal["fp32", "bf16"]
SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv", "gpipe")
METHODS = ("allgather", "ulysses", "ring")
_SHORT = {"dp_shard": "fsdp"}


def _pipelines(ranks: int, **sizes: int) -> dict[str, Layout]:
    beside = "".join(f"{_SHORT.get(name, name)}{size}-" for name, size in sizes.items())
    return {f"{beside}pp{ranks}-{schedule}": Layout(pp=ranks, pp_schedule=schedule, **sizes) for schedule in SCHEDULES}  # type: ignore[arg-type]


def _contexts(ranks: int, **sizes: int) -> dict[str, Layout]:
    beside = "".join(f"{_SHORT.get(name, name)}{size}-" for name, size in sizes.items())
    return {f"{beside}cp{ranks}-{method}": Layout(cp=ranks, cp_method=method, **sizes) for method in METHODS}  # type: ignore[arg-type]


def _alone(ranks: int) -> dict[str, Layout]:
    """Every axis by itself; `tp` with all its settings."""
    return {
        f"ddp{ranks}": Layout(dp_replicate=ranks),
        **{f"zero{zero}-{ranks}": Layout(dp_shard=ranks, zero=zero) for zero in (3, 1, 2)},
        f"tp{ranks}": Layout(tp=ranks),
        f"tp{ranks}-whole-positions": Layout(tp=ranks, sequence_parallel=False),
        f"tp{ranks}-whole-logits": Layout(tp=ranks, loss_parallel=False),
        **_pipelines(ranks),
        **_contexts(ranks),
        f"cp{ranks}-sharded": Layout(cp=ranks, cp_shards=True),
        f"ep{ranks}": Layout(dp_shard=ranks, ep=ranks),
    }


LAYOUTS: dict[str, Layout] = {
    **_alone(2),
    **_alone(4),
    "hsdp2x2": Layout(dp_replicate=2, dp_shard=2),
    "fsdp2-tp2": Layout(dp_shard=2, tp=2),
    **_pipelines(2, dp_shard=2),
    **_pipelines(2, tp=2),
    **_contexts(2, dp_shard=2),
    **_contexts(2, tp=2),
    "ddp2-tp2": Layout(dp_replicate=2, tp=2),
    "ddp2-pp2": Layout(dp_replicate=2, pp=2),
    "ddp2-cp2": Layout(dp_replicate=2, cp=2),
    "cp2-pp2": Layout(cp=2, pp=2),
    "fsdp2-ep2": Layout(dp_shard=4, ep=2),
    "ep2-tp2": Layout(dp_shard=2, ep=2, tp=2),
    "ep2-pp2": Layout(dp_shard=2, ep=2, pp=2),
    "ep2-cp2": Layout(dp_shard=2, ep=2, cp=2),
    **_alone(8),
    "hsdp2x4": Layout(dp_replicate=2, dp_shard=4),
    "fsdp2-tp2-pp2": Layout(dp_shard=2, tp=2, pp=2),
    "fsdp2-cp2-tp2": Layout(dp_shard=2, cp=2, tp=2),
    "fsdp2-cp2-pp2": Layout(dp_shard=2, cp=2, pp=2),
    "cp2-tp2-pp2": Layout(cp=2, tp=2, pp=2),
    "hsdp2x2-tp2": Layout(dp_replicate=2, dp_shard=2, tp=2),
    "fsdp4-tp2": Layout(dp_shard=4, tp=2),
    "fsdp4-pp2": Layout(dp_shard=4, pp=2),
    "fsdp4-ep2": Layout(dp_shard=8, ep=2),
    "ep2-tp2-pp2": Layout(dp_shard=2, ep=2, tp=2, pp=2),
    "ep2-cp2-tp2": Layout(dp_shard=2, ep=2, cp=2, tp=2),
    "ep4-pp2": Layout(dp_shard=4, ep=4, pp=2),
}
"""Layouts whose losses are compared with one GPU's, by name."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What is trained under every layout.

    Attributes:
        model: a name of MODELS.
        tuning: `qlora` packs the linear layers into 4 bits.
    """

    model: str
    precision: Precision
    tuning: Literal["full", "lora", "qlora"]


VARIANTS = (
    Variant("llama", "fp32", "full"),
    Variant("qwen3_moe", "fp32", "full"),
    Variant("llama", "bf16", "full"),
    Variant("llama", "fp32", "lora"),
    Variant("llama", "bf16", "qlora"),
    Variant("llama", "bf16", "lora"),
    Variant("qwen3_moe", "bf16", "full"),
    Variant("qwen3_moe", "fp32", "lora"),
    Variant("llama", "fp32", "qlora"),
)
"""The most telling first. Experts are not linear layers, so 4 bits are tried on the llama alone."""

TOLERANCES: dict[Precision, tuple[str, float]] = {
    "fp32": ("largest_difference", 1e-5),
    "bf16": ("mean_difference", 2e-3),
}
"""By precision: which figure, and how large it may be."""
NORM_TOLERANCE = 1e-3
"""Of gradient norms in fp32, relative."""
_WIDTHS: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
MODELS: dict[str, dict[str, Any]] = {"llama": _WIDTHS, "qwen3_moe": {**_WIDTHS, **_EXPERTS, "norm_topk_prob": True}}
"""Entries of the config of the models whose losses are compared."""
TINY_WIDTHS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "head_dim": 32,
    "initializer_range": 0.1,
}
LAYERS = 4
"""Of them at least; as many as a layout has stages where those are more."""


def equality_cases(ranks: int) -> list[str]:
    """Names `equality/RANKS/MODEL/PRECISION/TUNING/LAYOUT`."""
    return [
        f"equality/{ranks}/{variant.model}/{variant.precision}/{variant.tuning}/{name}"
        for variant in VARIANTS
        for name, layout in LAYOUTS.items()
        if layout.world_size == ranks and (layout.ep == 1 or variant.model == "qwen3_moe")
    ]


def parse(name: str) -> tuple[Variant, str]:
    """What a name of `equality_cases` stands for: the variant, and the layout's name."""
    _, _, model, precision, tuning, layout = name.split("/")
    return Variant(model, precision, tuning), layout  # type: ignore[arg-type]


def layers_of(layout: Layout) -> int:
    """Layers of the model that is trained under a layout."""
    return max(LAYERS, num_stages(layout))


def reference_of(name: str) -> str:
    """The case of one GPU that a case is compared with."""
    variant, layout = parse(name)
    layers = layers_of(LAYOUTS[layout])
    return f"equality/1/{variant.model}/{variant.precision}/{variant.tuning}/one-{layers}layers"
