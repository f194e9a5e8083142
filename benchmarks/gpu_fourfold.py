"""Fourfold's side of a workload of gpu.py: one run in this process, as `fourfold train` does it, and its figures.

    python benchmarks/gpu_fourfold.py JOB.json RESULT.json

The job holds `config` (a user's config file), `overrides` (words of the command line), `warmup`, `steps`,
`process_started` (seconds since 1970), `saves` (write what the run ends with, and time it) and `profile` (of one more
step).
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from environment import environment
from fourfold.base.log import setup_logging
from fourfold.config.load import load
from gpu_clock import GIB, DeviceClock, device_name, gpu_events, peak_memory, profiled, synchronize
from recorder import Prepared, prepare


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says and return the figures; `out_of_memory` alone where it did not fit."""
    try:
        return _measure(job)
    except torch.OutOfMemoryError as error:
        return {"device": device_name(), "environment": environment(), "out_of_memory": str(error)[:400]}


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    measured = job["warmup"] + job["steps"]
    profiler = _Profiler(measured) if job["profile"] else None
    clock = DeviceClock(turn=profiler or (lambda: None), process_started=job["process_started"])
    run = load({**job["config"], "max_steps": measured + bool(profiler)}, job["overrides"], verb="train")
    prepared = prepare(run, clock=clock)
    synchronize()
    loaded_s = time.time() - job["process_started"]
    loaded_gib = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else None
    save = _Save(prepared, writes=job["saves"])
    prepared.fit()
    clock.settle()
    result: dict[str, Any] = {
        "device": device_name(),
        "environment": environment(),
        "loaded_s": loaded_s,
        "loaded_gib": loaded_gib,
        "save_s": save.seconds,
        **peak_memory(),
        **_choices(prepared),
    }
    if profiler is not None:
        result["profile"] = profiler.figures(clock.steps.pop().tokens)
    samples = prepared.loop.state.num_samples / (measured + bool(profiler))
    result |= clock.figures(job["warmup"], samples)
    return {**result, "losses_finite": bool(result["losses"]) and all(map(math.isfinite, result["losses"]))}


def _choices(prepared: Prepared) -> dict[str, Any]:
    """What the engine chose."""
    policy, scaler = prepared.parts.policy, prepared.loop.scaler
    return {
        "micro_batch_tokens": policy.max_tokens,
        "packed": policy.packed,
        "recompute": prepared.parts.recompute,
        "loss_scale": None if scaler is None else scaler.get_scale(),
    }


class _Save:
    """Stands in for the loop's saving: times it, or leaves it out."""

    def __init__(self, prepared: Prepared, *, writes: bool) -> None:
        self.seconds: float | None = None
        self._save = prepared.loop.save if writes else None
        prepared.loop.save = self

    def __call__(self) -> Path:
        if self._save is None:
            return Path()
        synchronize()
        started = time.perf_counter()
        folder = self._save()
        self.seconds = time.perf_counter() - started
        return folder


class _Profiler:
    """Called before each step: profiles the one after the first `skipped`."""

    def __init__(self, skipped: int) -> None:
        self._left = skipped
        self._profile = profile(activities=profiled(on_gpu=torch.cuda.is_available()))
        self._started = 0.0

    def __call__(self) -> None:
        if self._left == 0:
            synchronize()
            self._profile.start()
            self._started = time.perf_counter()
        self._left -= 1

    def figures(self, tokens: int) -> dict[str, Any]:
        """Where the time of that step went; call once after the last step."""
        synchronize()
        wall_ms = 1e3 * (time.perf_counter() - self._started)
        self._profile.stop()
        on_cuda = torch.cuda.is_available()
        kernels = gpu_events(self._profile)
        sort_by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=sort_by, row_limit=70, max_name_column_width=70)
        return {
            "tokens": tokens,
            "wall_ms": wall_ms,
            "device_busy_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
            "kernels": len(kernels),
            "table": table,
        }


def main() -> None:
    job, result = (Path(name) for name in sys.argv[1:])
    setup_logging()
    result.write_text(json.dumps(measure(json.loads(job.read_text(encoding="utf-8"))), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
