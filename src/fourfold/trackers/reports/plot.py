"""Loss curves as PNG files, drawn from `trainer_log.jsonl`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from fourfold.base.log import get_logger
from fourfold.trackers import jsonl

log = get_logger(__name__)

_EVALUATED = ("loss", "accuracy")


def plot_losses(output_dir: Path, keys: Sequence[str] | None = None) -> list[Path]:
    """Draw one curve per figure, raw and smoothed, over the optimizer step.

    Args:
        output_dir: the run's folder, with `trainer_log.jsonl`.
        keys: fields of the log; by default `loss` and every evaluation loss and accuracy found there.
    Returns:
        The files written, `training_<key>.png`; a figure with fewer than two finite points is not drawn.
    """
    rows = jsonl.read_rows(output_dir / jsonl.FILE_NAME)
    written: list[Path] = []
    for key in keys if keys is not None else _keys_of(rows):
        points = [(row["current_steps"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
        if len(points) < 2:
            log.info("plot_loss: %s has %d points, too few for a curve", key, len(points))
            continue
        path = output_dir / f"training_{key.replace('/', '_')}.png"
        _draw(path, key, [step for step, _ in points], [value for _, value in points])
        written.append(path)
    return written


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the points, without the usual bias towards zero.

    With `a = 2 / (window + 1)` the average is `m_t = (1 - a) m_{t-1} + a x_t`, and `m_t / (1 - (1 - a)^t)` is a
    weighted mean of the values seen so far, so the curve starts at the first value.
    """
    decay = 1 - 2 / (max(len(values) / 10, 1) + 1)
    averages: list[float] = []
    mean = 0.0
    for count, value in enumerate(values, start=1):
        mean = decay * mean + (1 - decay) * value
        averages.append(mean / (1 - decay**count))
    return averages


def _keys_of(rows: Sequence[dict[str, float]]) -> list[str]:
    found = {key for row in rows for key in row}
    return ["loss", *sorted(key for key in found if key.startswith("eval_") and key.endswith(_EVALUATED))]


def _draw(path: Path, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
    from matplotlib.figure import Figure  # takes 0.4 s to import, and is needed at the end of a run

    # a Figure of its own, not pyplot's: no display is needed and nothing global is left behind
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.35, label="logged")
    axes.plot(steps, smooth(values), color="tab:blue", label="smoothed")
    axes.set_xlabel("step")
    axes.set_ylabel(key)
    run = path.resolve().parent.name
    axes.set_title(f"{key} of {run}" if run.isascii() else key)  # the font has no glyphs of many scripts
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = path.with_name(f".{path.name}.tmp")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # an evaluation set may have such a name
        figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(path)
