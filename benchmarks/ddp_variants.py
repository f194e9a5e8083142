"""What of a replica's step costs time: the exchange of gradients, its hook, or the dtype between layers.

    torchrun --nproc-per-node 2 benchmarks/ddp_variants.py [--tiny] [--out FOLDER]

A 1.5B llama with fp32 masters computes in bf16 on packed rows; every rank has its own samples. Rank 0 writes
FOLDER/ddp_variants.json: tokens/s over all ranks, milliseconds a step and peak memory of each variant.

none      no exchange: each rank trains alone, the bound of the others
shipped   `parallel.gradients.replicate`: a hook that sums, large buckets
plain     DDP without a hook, which averages; the loss is multiplied by the number of ranks
wide      shipped, but fp32 between layers, as autocast alone leaves it
lora      shipped, with adapters on a bf16 base
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from environment import environment
from fourfold.dataset.batch import Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.forward import StepModel
from fourfold.models.lora import use_short_forward
from fourfold.models.unwrap import base_model
from fourfold.parallel.gradients import DdpSync, NoSync, replicate
from fourfold.parallel.mesh import local_device, start_process_group, stop_process_group
from fourfold.parallel.reduce import Reducer, clip_gradients
from fourfold.parallel.step import Step
from fourfold.training.precision import narrow_outputs

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 384}
VARIANTS = ("none", "shipped", "plain", "wide", "lora")
WARM, TIMED = 3, 8


def make_samples(rank: int, count: int, length: int, vocab_size: int) -> list[Sample]:
    """Packed rows of `length` tokens in documents of 20 to 400."""
    source = random.Random(rank)
    samples = []
    for index in range(count):
        left = length
        while left:
            size = min(left, source.randint(20, 400))
            ids = [source.randrange(3, vocab_size) for _ in range(size)]
            samples.append(Sample({"": Example(ids, ids)}, index))
            left -= size
    return samples


def make_model(variant: str, shape: dict[str, int], device: torch.device) -> nn.Module:
    """The model of a variant on its device."""
    heads = max(shape["hidden_size"] // 64, 2)
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if variant == "lora" else torch.float32
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).to(dtype)
    if variant == "lora":
        adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters)
        use_short_forward(model)
    elif variant != "wide":
        narrow_outputs(model, torch.bfloat16)
    return model.train()


def make_step(variant: str, model: nn.Module, device: torch.device, policy: CutPolicy) -> Step:
    """The step of a variant."""
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    with autocast():
        runnable: Any = StepModel(model, packed=True)
    sync: Any = NoSync()
    scale: Callable[[Tensor], Tensor] | None = None
    if variant == "plain":
        wrapped = DistributedDataParallel(base_model(model), init_sync=False, gradient_as_bucket_view=True)
        world = dist.get_world_size()
        scale = lambda loss: loss * world  # noqa: E731
    elif variant != "none":
        wrapped = replicate(base_model(model), dist.group.WORLD)
    if variant != "none":
        runnable.runner, sync = wrapped, DdpSync(wrapped)
    reducer = Reducer(dist.group.WORLD, dist.group.WORLD)
    return Step(
        runnable, TokenLoss(), device, autocast, lambda: filler(policy), sync=sync, reducer=reducer, scale=scale
    )


def measure(variant: str, shape: dict[str, int], device: torch.device, length: int) -> dict[str, float]:
    """Time some steps of a variant."""
    model = make_model(variant, shape, device)
    policy = CutPolicy(packed=True, max_tokens=4 * length)
    step = make_step(variant, model, device, policy)
    samples = make_samples(dist.get_rank(), 4, length, shape["vocab_size"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda" or None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    losses: list[float] = []
    for _ in range(WARM + TIMED):
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()
        losses.append(step.forward_backward(cut(samples, policy)).loss)
        float(clip_gradients(parameters, 1.0))
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    seconds = median(times[WARM:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    tokens = 4 * length * dist.get_world_size()
    found = {"tokens_per_sec": tokens / seconds, "step_ms": seconds * 1e3, "peak_allocated_gib": peak}
    return found | {"first_loss": losses[0], "last_loss": losses[-1]}


def main() -> None:
    """Measure every variant, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU, to try the script out")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/benchmarks")))
    args = parser.parse_args()
    device = local_device(use_cpu=args.tiny)
    start_process_group(device, 300)
    shape, length = (TINY, 256) if args.tiny else (LARGE, 2048)
    results: dict[str, Any] = {"environment": {**environment(), "ranks": dist.get_world_size()}}
    for variant in VARIANTS:
        found = measure(variant, shape, device, length)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print(f"{variant:8}", "  ".join(f"{name} {value:.5g}" for name, value in found.items()), flush=True)
        results[variant] = found
    if dist.get_rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ddp_variants.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    stop_process_group()


if __name__ == "__main__":
    main()
