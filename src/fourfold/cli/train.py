"""`fourfold train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourfold.base.collector import lasting
from fourfold.base.errors import ConfigError
from fourfold.base.start_clock import StartClock
from fourfold.cli.session import Words, clear_errors, read_run

if TYPE_CHECKING:
    from fourfold.config.schema import Run


def _check_light(run: Run) -> None:
    """What can be wrong with data sets and folders, before torch is imported.

    Raises:
        ConfigError: all of it.
        DataError: a data set's file is not there.
    """
    from fourfold.dataset.stage_rows import check_named
    from fourfold.training.used_folder import check_unused

    problems: list[str] = []
    for check in (check_named, check_unused):
        try:
            check(run)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def train(words: Words = None) -> None:
    """Train, evaluate or predict, as the config says."""
    clock = StartClock.of_process()
    with clear_errors():
        run = read_run(words, "train")
        _check_light(run)
        clock.lap("config")
        with lasting():
            from fourfold.training import run as training

        clock.lap("imports")
        training.train(run, clock)
