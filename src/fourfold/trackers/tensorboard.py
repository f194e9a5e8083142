"""TensorBoard event files in `<output_dir>/runs`, with Hugging Face's names (`train/loss`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fourfold.trackers.interface import RunInfo, Tracker, grouped_name, public_config

PACKAGE = "tensorboard"


class TensorBoard(Tracker):
    """Writes every figure as a scalar."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(grouped_name(name), value, step)
        self._writer.flush()

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """As text in Markdown."""
        if not rows:
            return
        columns = list(rows[0])
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in rows:
            cells = (str(row[column]).replace("\n", "<br>").replace("|", "\\|") for column in columns)
            lines.append("| " + " | ".join(cells) + " |")
        self._writer.add_text(name, "\n".join(lines), step)

    def finish(self) -> None:
        self._writer.close()


def build(info: RunInfo) -> TensorBoard:
    """A tracker on `<output_dir>/runs`; points after `start_step` of an earlier run there are hidden."""
    writer = SummaryWriter(log_dir=str(info.output_dir / "runs"), purge_step=info.start_step + 1)
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in public_config(info).items()))
    return TensorBoard(writer)
