"""Unsloth's side of a workload of gpu.py: its model and LoRA in Transformers' Trainer as it leaves it, and its figures.

    python benchmarks/gpu_unsloth.py JOB.json RESULT.json

The job is that of gpu_hf.py; `checkpointing` is Unsloth's own kind.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

# before Transformers and PEFT, parts of which it replaces as they are imported
import unsloth  # type: ignore[import-not-found]

# isort: split
import torch
from safetensors.torch import save_file
from torch import nn

from gpu_clock import DeviceClock
from gpu_hf import arguments, measure_loop, read_rows, run, train_on

_SHORTEST = 512
"""Of `max_seq_length`: below it Unsloth takes plain checkpointing for its own."""
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_model(job: dict[str, Any], longest: int) -> nn.Module:
    """The model with LoRA adapters as Unsloth makes them.

    Args:
        longest: tokens of the longest padded row.
    """
    folder = job["model"]
    if not job["nf4"]:
        folder = _with_one_weight(Path(folder), Path(job["rows"]).parent / "unsloth-model")
        os.environ["UNSLOTH_WARN_UNINITIALIZED"] = "0"  # which else takes a weight that is missing for an error
    length = max(_SHORTEST, longest)
    checkpointing = "unsloth" if job["checkpointing"] else False
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=job["nf4"],
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
        local_files_only=True,
    )
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=_LINEARS,
        use_gradient_checkpointing=checkpointing,
        max_seq_length=length,
    )


def _with_one_weight(shape: Path, folder: Path) -> Path:
    """A checkpoint of a folder without weights: it holds one, and loading draws the others at random on the device."""
    shutil.copytree(shape, folder, dirs_exist_ok=True)
    hidden = json.loads((shape / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    norm = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    save_file(norm, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train(job: dict[str, Any], clock: DeviceClock) -> dict[str, Any]:
    """Train by Trainer, parts of whose loop Unsloth has replaced.

    Returns:
        the clock's figures, and `finite`: whether every trained number still is, at the end.
    """
    rows = read_rows(job)
    longest = max(len(row["input_ids"]) for row in rows)
    model = build_model(job, longest + -longest % 8)
    # what the model was made with counts; Trainer's own switch would put another kind in its place
    settings = {**arguments(job), "gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
    found = train_on(rows, model, settings, job, clock)
    # Trainer leaves a loss that is not a number out of what it logs
    finite = all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
    return {**found, "finite": finite}


if __name__ == "__main__":
    run(partial(measure_loop, train))
