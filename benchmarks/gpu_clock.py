"""Times steps by the device's own clock, so that no step waits to be timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from step_clock import StepClock, StepFigures, peak_rss_bytes

GIB = 2**30
Mark = torch.cuda.Event | float
"""A moment of a device's stream, or of the host's clock in seconds."""


@dataclass
class DeviceClock(StepClock):
    """Marks the end of each step in the device's stream; a step lasts from one mark to the next.

    So what a loop does between its steps counts, and what it hides behind the device's work does not.

    Attributes:
        process_started: when the process was started, in seconds since 1970.
        startup_s: from then to the end of the first step, once it is over.
    """

    process_started: float = 0.0
    startup_s: float | None = None
    _marks: list[Mark] = field(default_factory=list)

    def begin(self) -> None:
        """Call before each step."""
        self.turn()
        if not self._marks:
            self._marks.append(mark(on_gpu=torch.cuda.is_available()))

    def end(self, tokens: int) -> StepFigures:
        """Call after each step; its `seconds` are there after `settle`."""
        self._marks.append(mark(on_gpu=torch.cuda.is_available()))
        self.steps.append(StepFigures(len(self.steps) + 1, 0.0, 0.0, tokens, peak_rss_bytes()))
        if self.startup_s is None:
            synchronize()
            self.startup_s = time.time() - self.process_started
        return self.steps[-1]

    def settle(self) -> None:
        """Read the marks, once all steps are over."""
        synchronize()
        for step, first, second in zip(self.steps, self._marks, self._marks[1:], strict=False):
            step.seconds = seconds_between(first, second)

    def figures(self, warmup: int, samples_per_step: float) -> dict[str, Any]:
        """Speed over the steps after the first `warmup`, by the median step and by all of them."""
        chosen = self.steps[warmup:] or self.steps
        seconds, tokens = sum(s.seconds for s in chosen), sum(s.tokens for s in chosen)
        middle = median(s.seconds for s in chosen)
        return {
            "measured_steps": len(chosen),
            "s_per_step": middle,
            "mean_s_per_step": seconds / len(chosen),
            "tokens_per_step": tokens / len(chosen),
            "samples_per_step": samples_per_step,
            "samples_per_sec": samples_per_step / middle,
            "mean_samples_per_sec": samples_per_step * len(chosen) / seconds,
            "tokens_per_sec": median(s.tokens / s.seconds for s in chosen),
            "mean_tokens_per_sec": tokens / seconds,
            "startup_s": self.startup_s,
            "all_steps_s": sum(s.seconds for s in self.steps),
            "step_seconds": [round(s.seconds, 6) for s in self.steps],
            "losses": [s.loss for s in self.steps if s.loss is not None],
        }


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> dict[str, float]:
    """The largest memory of the process so far, in GiB."""
    found = {"peak_rss_gib": peak_rss_bytes() / GIB}
    if torch.cuda.is_available():
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


def device_name() -> str:
    """What the figures were measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def mark(*, on_gpu: bool) -> Mark:
    """Now: for the GPU, once it has done what it was given, or else for the host."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Mark, second: Mark) -> float:
    """From one mark to another of the same kind; the GPU must have come to both."""
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return 1e-3 * first.elapsed_time(second)
    assert isinstance(first, float)
    assert isinstance(second, float)
    return second - first


def profiled(*, on_gpu: bool) -> list[ProfilerActivity]:
    """What torch's profiler is to watch."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]


def gpu_events(profiler: profile) -> list[Any]:
    """Of what was profiled, what ran on the GPU."""
    return [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
