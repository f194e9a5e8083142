"""`fourfold train`."""

from __future__ import annotations

from fourfold.base.collector import lasting
from fourfold.base.start_clock import StartClock
from fourfold.cli.session import Words, clear_errors, read_run


def train(words: Words = None) -> None:
    """Train, evaluate or predict, as the config says."""
    clock = StartClock.of_process()
    with clear_errors():
        run = read_run(words, "train")
        from fourfold.dataset.stage_rows import check_named

        check_named(run)  # before torch is imported
        clock.lap("config")
        with lasting():
            from fourfold.training import run as training

        clock.lap("imports")
        training.train(run, clock)
