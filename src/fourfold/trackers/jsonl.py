"""`trainer_log.jsonl`: one JSON row per logged step, with the field names that LLaMA-Factory's users read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fourfold.base.units import format_duration
from fourfold.trackers.interface import RunInfo, Tracker

PACKAGE = "json"
FILE_NAME = "trainer_log.jsonl"

_RENAMED = {
    "learning_rate": "lr",
    "rewards/accuracies": "accuracy",
    "tokens_per_sec": "throughput",
    "num_tokens": "total_tokens",
    "peak_memory_gib": "vram_allocated",
    "reserved_memory_gib": "vram_reserved",
}
_DURATIONS = {"elapsed_s": "elapsed_time", "remaining_s": "remaining_time"}
_WHOLE = {"num_tokens"}


class Jsonl(Tracker):
    """Appends rows to a file; every row is on its way to the disk when `log` returns."""

    def __init__(self, path: Path, max_steps: int, start_step: int) -> None:
        self._max_steps, self._folder, self._start_step = max_steps, path.parent, start_step
        self._tables: dict[str, TextIO] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps(to_row(step, self._max_steps, figures)) + "\n")
        self._file.flush()

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Into a file of its own, e.g. `completions.jsonl`."""
        if name not in self._tables:
            path = self._folder / f"{name}.jsonl"
            keep_until(path, self._start_step)
            self._tables[name] = path.open("a", encoding="utf-8")
        for row in rows:
            self._tables[name].write(json.dumps({"current_steps": step, **row}, ensure_ascii=False) + "\n")
        self._tables[name].flush()

    def finish(self) -> None:
        for file in (self._file, *self._tables.values()):
            file.close()


def build(info: RunInfo) -> Jsonl:
    """A tracker that writes `trainer_log.jsonl` into the run's folder."""
    return Jsonl(info.output_dir / FILE_NAME, info.max_steps, info.start_step)


def to_row(step: int, max_steps: int, figures: Mapping[str, float]) -> dict[str, Any]:
    """One row of the file: known figures under their public names, others under their own."""
    row: dict[str, Any] = {"current_steps": step, "total_steps": max_steps}
    durations: dict[str, Any] = {}
    for name, value in figures.items():
        if name in _DURATIONS:
            durations[_DURATIONS[name]] = format_duration(value)
        else:
            row[_RENAMED.get(name, name)] = int(value) if name in _WHOLE else value
    row["percentage"] = round(100 * step / max_steps, 2) if max_steps else 100.0
    return row | durations


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a log file; a last line cut off by a killed run is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, so that a resumed run writes each of them once; with 0, drop the file."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["current_steps"] <= step] if step else []
    shortened = path.with_suffix(".jsonl.tmp")
    shortened.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shortened.replace(path)
