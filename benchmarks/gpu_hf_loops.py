"""Peers of gpu.py that Trainer does not do: DPO as TRL does it, TRL itself, and the longest sequence that fits."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_clock import DeviceClock, peak_memory, synchronize
from gpu_hf import DEVICE, IGNORED, ClockCallback, Row, arguments, build_model, collate

BETA = 0.1
_SHORTEST = 8192


def train_pairs(job: dict[str, Any], clock: DeviceClock) -> dict[str, Any]:
    """DPO: chosen and rejected in one padded batch, the reference's pass by the same model without its adapters."""
    pairs = json.loads(Path(job["rows"]).read_text(encoding="utf-8"))
    model, size, number = build_model(job), job["micro_batch"], job["accumulation"]
    _checkpoint(model, job)
    optimizer, schedule = _optimizer(model, job)
    for step in range(job["warmup"] + job["steps"]):
        clock.begin()
        samples = pairs[step * size * number : (step + 1) * size * number]
        losses = []
        for start in range(0, len(samples), size):
            micro_batch = samples[start : start + size]
            rows = [pair["chosen"] for pair in micro_batch] + [pair["rejected"] for pair in micro_batch]
            batch = {name: tensor.to(DEVICE) for name, tensor in collate(rows).items()}
            loss = _dpo_loss(model, batch) / number
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(_trained(model), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.end(sum(len(row["input_ids"]) for pair in samples for row in pair.values()))
        if (step + 1) % 5 == 0:
            clock.steps[-1].loss = float(torch.stack(losses).sum())
    clock.settle()
    return clock.figures(job["warmup"], size * number)


def _dpo_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = _log_probabilities(model, batch)
    margins = _log_probabilities(model, batch) - reference
    chosen, rejected = margins.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of the trained tokens of each row: [rows] fp32."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]
    trained = labels != IGNORED
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((chosen - logits.logsumexp(-1)) * trained).sum(-1)


def train_pairs_by_trl(job: dict[str, Any], clock: DeviceClock) -> dict[str, Any]:
    """DPO by TRL's trainer, on the same tokens as text."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    pairs = json.loads(Path(job["rows"]).read_text(encoding="utf-8"))
    texts = [{name: tokenizer.decode(ids) for name, ids in _parts(pair).items()} for pair in pairs]
    per_step = job["micro_batch"] * job["accumulation"]
    tokens = [
        sum(len(row["input_ids"]) for pair in pairs[start : start + per_step] for row in pair.values())
        for start in range(0, len(pairs), per_step)
    ]
    model = build_model(job)
    trainer = DPOTrainer(
        model=model,  # type: ignore[arg-type]
        args=DPOConfig(**arguments(job), beta=BETA, max_length=job["seq_len"]),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        callbacks=[ClockCallback(clock, tokens)],
    )
    trainer.train()
    clock.settle()
    return clock.figures(job["warmup"], per_step)


def _parts(pair: dict[str, Row]) -> dict[str, list[int]]:
    """The tokens of the prompt and of both answers."""
    start = next(i for i, label in enumerate(pair["chosen"]["labels"]) if label != IGNORED)
    answers = {name: row["input_ids"][start:] for name, row in pair.items()}
    return {"prompt": pair["chosen"]["input_ids"][:start], **answers}


def find_limit(job: dict[str, Any], clock: DeviceClock) -> dict[str, Any]:
    """Train single steps of one sequence, twice as long each time, until memory or the workload's length ends it."""
    model = build_model(job)
    _checkpoint(model, job)
    optimizer, _ = _optimizer(model, job)
    rows = json.loads(Path(job["rows"]).read_text(encoding="utf-8"))
    tokens = torch.tensor(rows[0][""]["input_ids"], device=DEVICE).unsqueeze(0)
    found: list[dict[str, float]] = []
    length = min(_SHORTEST, job["seq_len"] // 4)
    failed = None
    while length <= job["seq_len"]:
        clock.begin()
        started = time.perf_counter()
        try:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(input_ids=tokens[:, :length], labels=tokens[:, :length]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(_trained(model), 1.0)
            optimizer.step()
        except torch.OutOfMemoryError:
            failed = length
            break
        optimizer.zero_grad()
        synchronize()
        seconds = time.perf_counter() - started
        clock.end(length)
        found.append({"tokens": length, "s_per_step": seconds, "tokens_per_sec": length / seconds, **peak_memory()})
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        loss = None
        gc.collect()
        length *= 2
    best = found[-1] if found else {}
    return {**best, "lengths": found, "out_of_memory_at": failed, "startup_s": clock.startup_s}


def _checkpoint(model: Any, job: dict[str, Any]) -> None:
    if job["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _optimizer(
    model: nn.Module, job: dict[str, Any]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What Trainer makes by default."""
    optimizer = torch.optim.AdamW(_trained(model), lr=job["learning_rate"], weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job["warmup"] + job["steps"])
