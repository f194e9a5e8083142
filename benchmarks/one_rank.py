"""One rank of a cluster job on one GPU, its partners imagined: what it holds, and that it steps.

    python benchmarks/one_rank.py [--tiny] [--only fsdp8,tp8,...] [--out FOLDER]

A Llama-3-8B shape with random weights, trained in full in bf16 with AdamW, as rank 0 of 8 under a process group whose
collectives do nothing: losses mean nothing, memory does. For each layout the bytes of weights, gradients and optimizer
state beside the arithmetic, and the allocator's peak over two steps. `nccl` is a real group of one: FSDP2 with compiled
layers and recompute.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from environment import environment
from fourfold.dataset.batch import Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.forward import StepModel
from fourfold.models.targets import decoder_blocks
from fourfold.parallel.apply import parallelize
from fourfold.parallel.fsdp import shard
from fourfold.parallel.mesh import build_mesh
from fourfold.parallel.reduce import clip_gradients
from fourfold.parallel.shares import local
from fourfold.parallel.step import Step
from fourfold.planning.layout import Layout

LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 512}
LAYOUTS = {
    "fsdp8": Layout(dp_shard=8),
    "tp8": Layout(tp=8),
    "fsdp4xtp2": Layout(dp_shard=4, tp=2),
    "fsdp4xcp2": Layout(dp_shard=4, cp=2),
    "pp8": Layout(pp=8),
    "fsdp2xtp2xpp2": Layout(dp_shard=2, tp=2, pp=2),
}


def make_model(shape: dict[str, int], device: torch.device) -> LlamaForCausalLM:
    """Random weights in bf16."""
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(LlamaConfig(**shape, **HEADS)).to(torch.bfloat16).train()


def make_samples(length: int, count: int) -> list[Sample]:
    """Rows of one document each."""
    ids = list(range(3, 3 + length % 500)) * (length // 500 + 1)
    return [Sample({"": Example(ids[:length], ids[:length])}, index) for index in range(count)]


def rank_zero(layout: Layout, shape: dict[str, int], device: torch.device, length: int) -> dict[str, Any]:
    """Two steps of rank 0 of a layout."""
    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    try:
        module = make_model(shape, device)
        whole = sum(parameter.numel() for parameter in module.parameters())
        model = StepModel(module, packed=True)
        split = parallelize(module, list(decoder_blocks(module)[1]), build_mesh(layout, device), compute=None)
        model.take(split)
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = CutPolicy(packed=True, max_tokens=length, multiple=split.multiple, min_batches=split.min_batches)
        step = Step(
            model, TokenLoss(), device, split.autocast or nullcontext, lambda: filler(policy), sync=split.sync,
            reducer=split.reducer, localize=split.localize, finish=split.finish, staged=split.staged(model),
        )  # fmt: skip
        parameters = list(module.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        gc.collect()
        _reset_peak(device)
        for _ in range(2):
            optimizer.zero_grad()
            step.forward_backward(cut(make_samples(length, max(split.min_batches, 1)), policy))
            clip_gradients(parameters, 1.0, measure=split.gradient_norm)
            optimizer.step()
        held = sum(local(parameter).numel() for parameter in parameters)
        state = sum(
            local(value).numel() for entry in optimizer.state.values() for value in entry.values() if value.ndim
        )
        return {
            "whole_numel": whole,
            "held_numel": held,
            "share": held / whole,
            "state_numel": state,
            "weights_gradients_state_gib": 2 * (2 * held + state) / 2**30,
            "peak_allocated_gib": _peak(device),
        }
    finally:
        dist.destroy_process_group()


def nccl_of_one(shape: dict[str, int], device: torch.device, length: int) -> dict[str, Any]:
    """A real process group of one rank: FSDP2, every layer compiled, with and without recompute; losses must agree."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    found: dict[str, Any] = {}
    try:
        mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("dp_shard",))
        for name, compiled, recompute in (("plain", False, False), ("compile", True, False), ("both", True, True)):
            module = make_model({**shape, "num_hidden_layers": min(shape["num_hidden_layers"], 8)}, device)
            model = StepModel(module, packed=True)
            blocks = list(decoder_blocks(module)[1])
            if recompute:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if compiled:
                for block in blocks:
                    block.compile()
            shard(module, blocks, mesh, reshard=True, compute=None)
            policy = CutPolicy(packed=True, max_tokens=length)
            step = Step(model, TokenLoss(), device, nullcontext, lambda policy=policy: filler(policy))
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
            _reset_peak(device)
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                losses.append(step.forward_backward(cut(make_samples(length, 1), policy)).loss)
                optimizer.step()
            found[name] = {"losses": losses, "peak_allocated_gib": _peak(device)}
            del module, model, optimizer, step, blocks
            gc.collect()
    finally:
        dist.destroy_process_group()
    return found


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def main() -> None:
    """Run what is asked for; a layout that fails is told, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU")
    parser.add_argument("--only", default=",".join(["nccl", *LAYOUTS]))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/benchmarks")))
    args = parser.parse_args()
    shape = TINY if args.tiny else LARGE
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    results: dict[str, Any] = {"environment": environment()}
    for name in args.only.split(","):
        run: Callable[[], dict[str, Any]] = (
            (lambda: nccl_of_one(shape, device, args.length))
            if name == "nccl"
            else (lambda name=name: rank_zero(LAYOUTS[name], shape, device, args.length))
        )
        try:
            results[name] = run()
        except Exception:
            results[name] = {"error": traceback.format_exc()[-1500:]}
        print(name, json.dumps(results[name])[:1600], flush=True)
        gc.collect()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "one_rank.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
