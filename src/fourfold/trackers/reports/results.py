"""`<split>_results.json` and `all_results.json`, as Hugging Face's and LLaMA-Factory's users expect them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fourfold.base.units import format_duration

Split = Literal["train", "eval", "predict"]


def speed(split: Split, runtime_s: float, num_samples: int, num_steps: int) -> dict[str, float]:
    """The keys `<split>_runtime` (seconds), `<split>_samples_per_second` and `<split>_steps_per_second`."""
    figures = {f"{split}_runtime": round(runtime_s, 4)}
    if runtime_s > 0:
        figures[f"{split}_samples_per_second"] = round(num_samples / runtime_s, 3)
        figures[f"{split}_steps_per_second"] = round(num_steps / runtime_s, 3)
    return figures


def write_results(output_dir: Path, split: Split, figures: Mapping[str, float]) -> Path:
    """Write `<split>_results.json` and merge the figures into `all_results.json`.

    Args:
        figures: e.g. epoch, total_flos, train_loss and what `speed` returns.
    Returns:
        The file of this split.
    """
    path = output_dir / f"{split}_results.json"
    _write(path, figures)
    _write(output_dir / "all_results.json", read_results(output_dir) | dict(figures))
    return path


def read_results(output_dir: Path) -> dict[str, Any]:
    """The figures of `all_results.json`; empty if there is none."""
    path = output_dir / "all_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def format_results(split: Split, figures: Mapping[str, float]) -> str:
    """The figures as an aligned block under a heading, sorted by name."""
    shown = {name: _readable(name, value) for name, value in sorted(figures.items())}
    width = max((len(name) for name in shown), default=0)
    values = max((len(text) for text in shown.values()), default=0)
    lines = [f"  {name:<{width}} = {text:>{values}}" for name, text in shown.items()]
    return "\n".join([f"***** {split} metrics *****", *lines])


def _readable(name: str, value: float) -> str:
    if name.endswith("_runtime"):
        return format_duration(value)
    if name == "total_flos":
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _write(path: Path, figures: Mapping[str, float]) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(dict(figures), indent=4, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(path)
