"""Published training speeds beside what the planner's cost model says of the same runs.

    python benchmarks/published_runs.py [--json FILE]

One row a run: tokens/s for each GPU as published (or from a published MFU), as predicted, the deviation, and why the
two may differ where they do by more than a fifth. None of these runs was used to fit a constant of the model. The
engines are other programs than this one: `compiled` stands for fused layers; float8 rows take the linear layers' peak
in fp8.

Sources: torchtitan, benchmarks/llama3_h100_202412_torchtitan.md and llama3_8b_h200_2025-06_torchtitan.md; performance
summaries of NVIDIA NeMo AutoModel and Megatron-Bridge; README of Megatron-LM (MFU by model size).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformers import AutoConfig, GPTNeoXConfig, Qwen2Config

from fourfold.planning.cost import estimate_cost
from fourfold.planning.device import Device
from fourfold.planning.hardware import build_cluster, find_device
from fourfold.planning.job import Job, Recompute
from fourfold.planning.kernels import COMPILED, EAGER, Engine
from fourfold.planning.layout import Layout
from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import ModelShape

MODELS = Path(__file__).parents[1] / "examples" / "models"
FAR = 0.2
"""Deviation from which a row needs a reason."""

FLOAT8 = replace(COMPILED, name="compiled, fp8", linear="fp8")

# layers and hidden size that make up the published numbers of parameters with a vocabulary of 131,072, heads of 128,
# an MLP of four times the hidden size and an untied head; the layouts are assumed, the README's table is an image
MEGATRON = {
    "1.7B": (24, 2048, Layout(dp_shard=32, zero=1), 0.41),
    "7.1B": (30, 4096, Layout(dp_shard=32, tp=2, zero=1), 0.47),
    "16B": (32, 6144, Layout(dp_shard=32, tp=4, zero=1), 0.49),
    "70B": (84, 8192, Layout(dp_shard=32, tp=8, pp=2, pp_schedule="interleaved_1f1b"), 0.42),
    "177B": (96, 12288, Layout(dp_shard=16, tp=8, pp=8, pp_schedule="interleaved_1f1b"), 0.44),
    "314B": (96, 16384, Layout(dp_shard=16, tp=8, pp=8, pp_schedule="interleaved_1f1b"), 0.48),
    "462B": (112, 18432, Layout(dp_shard=96, tp=8, pp=8, pp_schedule="interleaved_1f1b"), 0.47),
}
MEGATRON_SEQUENCES = 48
"""Of a data-parallel rank in a step: assumed, a global batch of some thousands on the largest."""


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """One run.

    Attributes:
        who: published it, and what was run.
        published: tokens/s for each GPU.
        shape, job, layout, recompute, micro_batch, engine: as `estimate_cost` takes them.
        device: each GPU.
        why: what the model does not know of the run.
    """

    who: str
    published: float
    shape: ModelShape
    job: Job
    layout: Layout
    recompute: Recompute
    micro_batch: int
    engine: Engine
    device: Device
    why: str

    def predict(self) -> float:
        """Tokens/s for each GPU."""
        if self.recompute != "selective":
            return self._predict(self.recompute)
        # torchtitan's kind keeps every second product only: half way between none of the products and all made again
        return 2 / (1 / self._predict("selective") + 1 / self._predict("full"))

    def _predict(self, recompute: Recompute) -> float:
        per_node = min(self.layout.world_size, 8)
        cluster = build_cluster(self.device, per_node, self.layout.world_size // per_node)
        cost = estimate_cost(self.shape, self.job, self.layout, cluster, recompute, self.micro_batch, self.engine)
        return cost.tokens_per_s / self.layout.world_size


@cache
def shape_of(name: str) -> ModelShape:
    """The shape of an example model."""
    return read_shape(AutoConfig.from_pretrained(MODELS / name))


def hbm2e_h100() -> Device:
    """torchtitan's card: 96 GB of HBM2e at 2.4 TB/s, limited to 500 W of 700.

    Its peak is not published; products are assumed to be slower by the square root of the power, 0.85.
    """
    h100 = find_device("h100")
    curve = tuple((flops, 0.85 * share) for flops, share in h100.efficiency["bf16"])
    return replace(h100, title="NVIDIA H100 96GB HBM2e 500W", hbm_bytes_per_s=2.4e12, efficiency={"bf16": curve})


def torchtitan_runs() -> Iterator[PublishedRun]:
    """Llama 3.1 pre-training, AdamW, fp32 masters, whole sequences."""
    card, sequence = hbm2e_h100(), 8192

    def run(
        what: str,
        published: float,
        model: str,
        layout: Layout,
        recompute: Recompute,
        engine: Engine,
        *,
        sequences: int,
        micro: int,
        length: int = sequence,
        why: str,
    ) -> PublishedRun:
        job = Job(tuning="full", sequence=length, sequences_per_step=sequences * layout.dp)
        micro_batch = micro * length
        return PublishedRun(
            f"torchtitan {what}", published, shape_of(model), job, layout, recompute, micro_batch, engine, card, why
        )

    of_card = "the card's clock at 500 W is assumed"
    for gpus, rows in (
        (8, ((5762, EAGER), (6667, COMPILED), (8532, FLOAT8))),
        (128, ((5605, EAGER), (6514, COMPILED), (8380, FLOAT8))),
    ):
        for published, engine in rows:
            yield run(
                f"8B fsdp {gpus}",
                published,
                "Llama-3.1-8B",
                Layout(dp_shard=gpus),
                "selective",
                engine,
                sequences=2,
                micro=2,
                why=f"{of_card}; casts to float8 and their scales are free in the model",
            )
    for cp, published in ((1, 3890), (2, 2540), (4, 1071), (8, 548)):
        layout = Layout(dp_shard=8 // cp, cp=cp, cp_shards=True)
        yield run(
            f"8B fsdp {8 // cp} cp {cp} at {32 * cp}K",
            published,
            "Llama-3.1-8B",
            layout,
            "full",
            FLOAT8,
            sequences=1,
            micro=1,
            length=32768 * cp,
            why=f"{of_card}, and does not slow attention in the model, most of the work here; from 64K on the "
            "published speed falls by more (2.4 times for twice the length) than attention's work grows: not explained",
        )
    for published, what in ((829, ""), (876, ", async TP")):
        yield run(
            f"70B fsdp 32 tp 8{what}",
            published,
            "Llama-3.1-70B",
            Layout(dp_shard=32, tp=8),
            "full",
            FLOAT8,
            sequences=16,
            micro=16,
            why=f"{of_card}; async TP hides a part of what we expose; casts to float8 are free here",
        )
    pipeline = Layout(dp_shard=8, tp=8, pp=8)
    for published, layout in ((100, pipeline), (128, replace(pipeline, pp_schedule="interleaved_1f1b"))):
        yield run(
            f"405B fsdp 8 tp 8 pp 8 {layout.pp_schedule[:11]}",
            published,
            "Llama-3.1-405B",
            layout,
            "full",
            FLOAT8,
            sequences=32,
            micro=4,
            why=f"{of_card}; 8 micro-batches of 4 assumed (the default was as many as stages); async TP",
        )
    yield replace(
        run(
            "8B fsdp 32 on H200",
            10938,
            "Llama-3.1-8B",
            Layout(dp_shard=32),
            "selective",
            FLOAT8,
            sequences=2,
            micro=2,
            why="casts to float8 are free in the model; the run had no recompute setting of its own",
        ),
        device=find_device("h200"),
    )


def nvidia_runs() -> Iterator[PublishedRun]:
    """NeMo AutoModel's LoRA, Megatron-Bridge's pre-training, Megatron-LM's MFU by size."""
    card = find_device("h100")
    lora = Job(tuning="lora", lora_rank=8, sequence=4096, sequences_per_step=2)
    qwen = read_shape(
        Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        )
    )
    for what, shape, published in (("Llama-3-8B", shape_of("Llama-3-8B"), 12473), ("Qwen2.5-7B", qwen, 14110)):
        yield PublishedRun(
            f"NeMo LoRA {what}",
            published,
            shape,
            lora,
            Layout(),
            "none",
            8192,
            EAGER,
            card,
            "fused kernels for LoRA, norms and loss, and cuDNN attention; ours is eager",
        )
    bridge = Job(tuning="full", sequence=8192, sequences_per_step=128)
    yield PublishedRun(
        "Megatron-Bridge 8B fp8",
        14451,
        shape_of("Llama-3.1-8B"),
        bridge,
        Layout(dp_shard=8, zero=1),
        "none",
        8192,
        FLOAT8,
        card,
        "flash attention 3 or cuDNN (twice flash 2 on this card), bf16 gradients, weights gathered in fp8",
    )
    peak = card.peak("bf16")
    for size, (layers, hidden, layout, mfu) in MEGATRON.items():
        config = GPTNeoXConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            vocab_size=131072,
            num_attention_heads=hidden // 128,
            use_parallel_residual=False,
        )
        shape = read_shape(config)
        per_token = 6 * shape.active + 6 * layers * hidden * 4096
        job = Job(tuning="full", sequence=4096, sequences_per_step=MEGATRON_SEQUENCES * layout.dp)
        micro_batch = 4096 * (4 if layout.pp == 1 else 1)
        yield PublishedRun(
            f"Megatron-LM {size}",
            mfu * peak / per_token,
            shape,
            job,
            layout,
            "none",
            micro_batch,
            COMPILED,
            card,
            "layout and batch are assumed; tp communication overlaps there, attention is faster, and interleaved "
            "stages save half the bubble, as torch's do for two ranks only",
        )


def main() -> None:
    """Print the table, then the reasons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args()
    rows = []
    print(f"{'run':<44}{'engine':<16}{'published':>10}{'predicted':>10}{'off by':>9}")
    for run in (*torchtitan_runs(), *nvidia_runs()):
        predicted = run.predict()
        off = predicted / run.published - 1
        rows.append({"run": run.who, "published": run.published, "predicted": predicted, "off": off, "why": run.why})
        print(f"{run.who:<44}{run.engine.name:<16}{run.published:>10,.0f}{predicted:>10,.0f}{off:>+9.0%}")
    print(f"\nOff by more than {FAR:.0%}:")
    for row in rows:
        if abs(row["off"]) > FAR:
            print(f"  {row['run']}: {row['why']}.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
