"""LoRA SFT of a 4-bit Llama-3-8B on 591 rows: the run that a new user starts with.

    python benchmarks/gpu_sft_nf4.py CONFIG.json RESULT.json [--profile]

runs one config in this process and writes what it measured; `gpu.py` makes model, rows and configs and calls it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_layers import GradientCheckpointingLayer

from environment import environment
from fourfold.base.log import setup_logging
from fourfold.base.units import GIB
from fourfold.config.load import load
from fourfold.dataset.collate import cut
from recorder import Prepared, prepare
from step_clock import summary

CONFIG: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": "unsloth/llama-3-8b-Instruct-bnb-4bit",
    "dataset": "identity,alpaca_en_demo",
    "dataset_vars": {"name": "Fourfold", "author": "the Fourfold project"},
    "template": "llama3",
    "finetuning_type": "lora",
    "lora_target": "all",
    "output_dir": "llama3_lora",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 5,
    "warmup_ratio": 0.1,
    "save_steps": 1000,
    "learning_rate": 5e-05,
    "num_train_epochs": 3.0,
    "max_samples": 500,
    "max_grad_norm": 1.0,
    "loraplus_lr_ratio": 16.0,
    "fp16": True,
    "report_to": "none",
}
"""The file that such a user brings; the model, the data and the output are put beside it by the benchmark."""


def measure(config: dict[str, Any], *, with_profile: bool) -> dict[str, Any]:
    """Train as the config says and return the figures."""
    started = time.perf_counter()
    run = load(config, verb="train")
    prepared = prepare(run)
    ready = time.perf_counter()
    policy = prepared.parts.policy
    loaded = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else None
    prepared.fit()
    steps = prepared.clock.steps
    figures = summary(steps)
    samples = prepared.loop.state.num_samples
    losses = [s.loss for s in steps if s.loss is not None]
    result: dict[str, Any] = {
        "environment": environment(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "config": config,
        "load_s": ready - started,
        "first_step_s": ready - started + steps[0].seconds,
        "train_s": sum(s.seconds for s in steps),
        "num_steps": len(steps),
        "micro_batch_tokens": policy.max_tokens,
        "recompute": _recomputes(prepared),
        "samples_per_sec": samples / sum(s.seconds for s in steps),
        "median_samples_per_sec": samples / len(steps) / figures["s_per_step"],
        "losses_finite": bool(losses) and all(math.isfinite(loss) for loss in losses),
        "loss_scale": None if prepared.loop.scaler is None else prepared.loop.scaler.get_scale(),
        "losses": losses,
        "loaded_gib": loaded,
        **figures,
    }
    if torch.cuda.is_available():
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    if with_profile:
        result["profile"] = profile_step(prepared)
    return result


def _recomputes(prepared: Prepared) -> bool:
    layers = [m for m in prepared.parts.module.modules() if isinstance(m, GradientCheckpointingLayer)]
    return any(layer.gradient_checkpointing for layer in layers)


def profile_step(prepared: Prepared) -> dict[str, Any]:
    """Where the time of one step's forward and backward goes: the device's busy share and its longest kernels."""
    samples = next(prepared.loop.loader.steps(0)).samples
    batches = cut(samples, prepared.parts.policy)
    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    prepared.loop.step.forward_backward(batches)
    with profile(activities=activities) as found:
        started = time.perf_counter()
        prepared.loop.step.forward_backward(batches)
        if on_cuda:
            torch.cuda.synchronize()
        wall_ms = 1e3 * (time.perf_counter() - started)
    sort_by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = found.events() or []
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    busy_ms = sum(event.self_device_time_total for event in kernels) / 1e3
    table = found.key_averages().table(sort_by=sort_by, row_limit=30, max_name_column_width=70)
    return {
        "wall_ms": wall_ms,
        "device_busy_ms": busy_ms,
        "kernels": len(kernels),
        "tokens": sum(batch.num_tokens for batch in batches),
        "micro_batches": len(batches),
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--profile", action="store_true", help="also profile one step afterwards")
    args = parser.parse_args()
    setup_logging()
    result = measure(json.loads(args.config.read_text(encoding="utf-8")), with_profile=args.profile)
    args.result.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
