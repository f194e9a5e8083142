"""The beginning of every verb, from the command line or from Python: a checked run, and a log that tells of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fourfold.base.log import get_logger, setup_logging
from fourfold.config.load import Source, load
from fourfold.config.paths import check_paths
from fourfold.config.rules import Verb
from fourfold.config.schema import Run

log = get_logger(__name__)


def begin(source: Source | None, overrides: Sequence[str] | Mapping[str, Any], verb: Verb) -> Run:
    """Load a config and check it for `verb`; set logging up and log what was mapped.

    Raises:
        ConfigError: with every problem of the keys, or of the local paths among them.
    """
    run = load(source, overrides, verb=verb)
    check_paths(run, verb)
    begin_logging(run)
    for note in run.notes:
        log.info("%s", note)
    return run


def begin_logging(run: Run) -> None:
    """Set logging up as `log_level` says."""
    level = run.output.log_level
    setup_logging(verbose=level in ("debug", "detail"))
    if level in ("warning", "error", "critical"):
        get_logger("fourfold").setLevel(level.upper())
