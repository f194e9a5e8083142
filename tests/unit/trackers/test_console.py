import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from fourfold.base.log import get_logger, setup_logging
from fourfold.trackers import console
from fourfold.trackers.interface import RunInfo

FIGURES = {
    "loss": 2.84694,
    "grad_norm": 12.5,
    "learning_rate": 8.695652173913044e-06,
    "epoch": 0.0678,
    "tokens_per_sec": 1812.4,
    "num_tokens": 4096.0,
    "elapsed_s": 10.0,
    "remaining_s": 620.0,
    "peak_memory_gib": 1.5,
}


def test_line_when_not_a_terminal_is_plain_and_readable(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    tracker = console.build(RunInfo(tmp_path, "run", max_steps=222))
    tracker.log(5, FIGURES)
    tracker.advance(6)
    tracker.finish()
    assert capsys.readouterr().err == (
        "{'loss': 2.8469, 'grad_norm': 12.5, 'learning_rate': 8.6957e-06, 'epoch': 0.0678}  step 5/222  "
        "1,812 tokens/s  ETA 0:10:20  peak 1.50 GiB\n"
    )


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (float("nan"), "nan"), (3.0, "3"), (1e-9, "1.0000e-09")])
def test_line_shows_number_shortly(value: float, shown: str):
    assert console.to_line(1, 2, {"loss": value}).startswith(f"{{'loss': {shown}}}")


def test_terminal_shows_a_bar_with_loss_and_eta():
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=160, color_system=None)
    tracker = console.ConsoleTracker(terminal, max_steps=222, start_step=4)
    tracker.advance(5)
    tracker.log(5, FIGURES)
    tracker.finish()
    tracker.finish()
    shown = screen.getvalue()
    assert "5/222" in shown
    assert "loss 2.8469  lr 8.6957e-06  1,812 tokens/s  ETA 0:10:20" in shown


def test_log_line_while_the_bar_shows_stands_above_it(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    setup_logging()
    tracker = console.ConsoleTracker(Console(file=screen, force_terminal=True, width=80), max_steps=10, start_step=0)
    try:
        get_logger("fourfold.test").info("Saved a checkpoint")
    finally:
        tracker.finish()
        logging.getLogger("fourfold").handlers.clear()
        logging.getLogger("fourfold").propagate = True
    before, after = screen.getvalue().split("Saved a checkpoint", 1)
    assert before.endswith("\x1b[2K")  # the bar is erased before the line is written
    assert after.startswith("\n")
