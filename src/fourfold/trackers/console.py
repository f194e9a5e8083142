"""Standard error: a progress bar on a terminal, and one plain line per logged step everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from fourfold.base.units import format_duration
from fourfold.trackers.interface import RunInfo, Tracker

PACKAGE = "rich"

_BESIDE_BRACES = {"tokens_per_sec", "num_tokens", "elapsed_s", "remaining_s", "peak_memory_gib", "reserved_memory_gib"}


class ConsoleTracker(Tracker):
    """Shows the figures to whoever watches the run."""

    def __init__(self, console: Console, max_steps: int, start_step: int) -> None:
        self._console, self._max_steps = console, max_steps
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._progress = _progress(console)
            self._task = self._progress.add_task(
                "", total=max_steps, completed=start_step, figures="waiting for the first step"
            )
            self._progress.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        line = to_line(step, self._max_steps, figures)
        self._console.print(Text(line), soft_wrap=True)
        if self._progress is not None and "loss" in figures:
            self._progress.update(self._task, completed=step, figures=to_bar_text(figures))

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def build(info: RunInfo) -> ConsoleTracker:
    """A tracker on standard error; `disable_tqdm` keeps it to plain lines."""
    console = Console(stderr=True, force_terminal=False if info.config.get("disable_tqdm") else None)
    return ConsoleTracker(console, info.max_steps, info.start_step)


def _progress(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )


def to_line(step: int, max_steps: int, figures: Mapping[str, float]) -> str:
    """One logged step for people and for grep, e.g. `{'loss': 1.2345, 'epoch': 0.07}  step 5/222  812 tokens/s`."""
    shown = ", ".join(f"'{name}': {_number(value)}" for name, value in figures.items() if name not in _BESIDE_BRACES)
    parts = [f"{{{shown}}}", f"step {step}/{max_steps}", *_speed(figures)]
    if "peak_memory_gib" in figures:
        parts.append(f"peak {figures['peak_memory_gib']:.2f} GiB")
    return "  ".join(parts)


def to_bar_text(figures: Mapping[str, float]) -> str:
    """What stands beside the progress bar."""
    parts = [f"loss {_number(figures['loss'])}"]
    if "learning_rate" in figures:
        parts.append(f"lr {_number(figures['learning_rate'])}")
    return "  ".join([*parts, *_speed(figures)])


def _speed(figures: Mapping[str, float]) -> list[str]:
    parts: list[str] = []
    if "tokens_per_sec" in figures:
        parts.append(f"{figures['tokens_per_sec']:,.0f} tokens/s")
    if "remaining_s" in figures:
        parts.append(f"ETA {format_duration(figures['remaining_s'])}")
    return parts


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5 or value != value:
        return f"{value:.4f}".rstrip("0").rstrip(".") if value == value else "nan"
    return f"{value:.4e}"
