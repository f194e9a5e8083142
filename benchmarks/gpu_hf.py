"""The peers' side of a workload of gpu.py: Transformers' model with PEFT, trained in this process, and its figures.

    python benchmarks/gpu_hf.py JOB.json RESULT.json

The job holds `model` (a folder), `rows` (a file of samples as tokens), `nf4`, `tuning` (lora or full), `pure_bf16`,
`loop`, `experts`, `attention`, `liger`, `micro_batch`, `accumulation`, `checkpointing`, `learning_rate`, `warmup`,
`steps`, `seq_len` and `process_started`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from environment import environment
from gpu_clock import DeviceClock, device_name, peak_memory

Row = dict[str, list[int]]
IGNORED = -100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(job: dict[str, Any]) -> nn.Module:
    """The model on the device, with LoRA adapters if asked for: what is trained is fp32 unless `pure_bf16`."""
    folder, full = job["model"], job["tuning"] == "full"
    dtype = torch.float32 if full and not job["pure_bf16"] else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if job["experts"] is not None:
        options["experts_implementation"] = job["experts"]
    if job["attention"] is not None:
        options["attn_implementation"] = job["attention"]
    torch.manual_seed(42)
    if job["nf4"]:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": DEVICE}, **options)
    else:
        with DEVICE:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
    model.config.use_cache = False
    if full:
        return model.train()
    if job["checkpointing"]:
        model.enable_input_require_grads()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def collate(rows: list[Row], multiple: int = 8) -> dict[str, Tensor]:
    """Pad on the right to the longest row, and on to a multiple: [rows, positions] int64 each."""
    longest = max(len(row["input_ids"]) for row in rows)
    longest += -longest % multiple

    def stack(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    return {
        "input_ids": stack([row["input_ids"] for row in rows], 0),
        "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": stack([row["labels"] for row in rows], IGNORED),
    }


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Of Transformers' TrainingArguments, and of TRL's."""
    return {
        "output_dir": str(Path(job["rows"]).parent / "peer"),
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "gradient_checkpointing": job["checkpointing"],
        # LLaMA-Factory's choice; for full tuning no input has a gradient of its own, which the other kind needs
        "gradient_checkpointing_kwargs": {"use_reentrant": job["tuning"] == "lora"} if job["checkpointing"] else None,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "max_steps": job["warmup"] + job["steps"],
        "bf16": not job["pure_bf16"],
        "use_liger_kernel": job["liger"],
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": DEVICE.type == "cpu",
        "dataloader_pin_memory": DEVICE.type != "cpu",
    }


class InOrder(Trainer):
    """Trainer that takes the rows as they come."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class ClockCallback(TrainerCallback):
    """Gives a clock the beat of Trainer's loop.

    Args:
        tokens: of each step, from the first.
    """

    def __init__(self, clock: DeviceClock, tokens: list[int]) -> None:
        self._clock, self._tokens = clock, tokens

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self._clock.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.end(self._tokens[state.global_step - 1])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._clock.steps[-1].loss = float(logs["loss"])


def train(job: dict[str, Any], clock: DeviceClock) -> dict[str, Any]:
    """Train by Trainer itself."""
    return train_on(read_rows(job), build_model(job), arguments(job), job, clock)


def read_rows(job: dict[str, Any]) -> list[Row]:
    """The samples of a job, in order."""
    return [sample[""] for sample in json.loads(Path(job["rows"]).read_text(encoding="utf-8"))]


def train_on(
    rows: list[Row], model: nn.Module, settings: dict[str, Any], job: dict[str, Any], clock: DeviceClock
) -> dict[str, Any]:
    """Train a model by Trainer, whose arguments are `settings`, and return the clock's figures."""
    per_step = job["micro_batch"] * job["accumulation"]
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = [sum(lengths[start : start + per_step]) for start in range(0, len(lengths), per_step)]
    trainer = InOrder(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[ClockCallback(clock, tokens)],
    )
    trainer.train()
    clock.settle()
    return clock.figures(job["warmup"], per_step)


Loop = Callable[[dict[str, Any], DeviceClock], dict[str, Any]]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says and return the figures."""
    from gpu_hf_loops import find_limit, train_pairs, train_pairs_by_trl

    loops: dict[str, Loop] = {
        "trainer": train,
        "pairs": train_pairs,
        "trl": train_pairs_by_trl,
        "doubling": find_limit,
    }
    return measure_loop(loops[job["loop"]], job)


def measure_loop(loop: Loop, job: dict[str, Any]) -> dict[str, Any]:
    """The figures of a loop; `out_of_memory` where it did not fit."""
    clock = DeviceClock(process_started=job["process_started"])
    try:
        found = loop(job, clock)
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error)[:400]}
    return {"device": device_name(), "environment": environment(), **peak_memory(), **found}


def run(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Measure the job of the command line and write what was found."""
    job, result = (Path(name) for name in sys.argv[1:])
    result.write_text(json.dumps(measure(json.loads(job.read_text(encoding="utf-8"))), indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(measure)
