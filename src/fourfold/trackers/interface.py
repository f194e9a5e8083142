"""What a tracker is: a place that a run's figures are written to. One file per tracker.

The file name is the value of `report_to`; every module of this folder is an entry, what makes files from the
figures afterwards lies in `reports/`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger

log = get_logger(__name__)

_PACKAGE = "fourfold.trackers"
_ALWAYS = ("jsonl", "console")
_SECRET = ("_token", "_secret", "_api_key", "_webhook_url")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker may want to know before the first step.

    Attributes:
        output_dir: the run's folder.
        run_name: a name for people.
        max_steps: optimizer steps of the whole run.
        start_step: optimizer steps already done (0 unless resumed); later figures are to be replaced.
        config: the resolved config, flat; without secrets where it comes from a Run.
        secrets: keys of accounts by config key, for the tracker that they belong to; shown nowhere.
    """

    output_dir: Path
    run_name: str
    max_steps: int
    start_step: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


class Tracker(Protocol):
    """Receives figures from rank 0.

    Each file of this folder has `build(info: RunInfo) -> Tracker` and `PACKAGE: str`, the import name of the
    package that it needs. Known figures: loss, grad_norm, learning_rate, epoch, tokens_per_sec, num_tokens,
    elapsed_s, remaining_s, peak_memory_gib, reserved_memory_gib, eval_loss; others are passed on by their name.
    """

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step; training ones have plain names (`loss`), evaluation ones begin with `eval_`."""
        ...

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of texts and numbers, all with the same columns; a tracker that has no tables leaves them out."""
        return

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done; called after each, also when nothing is logged."""
        return

    def finish(self) -> None:
        """Called once, also when the run fails."""
        ...


def open_trackers(names: Sequence[str], info: RunInfo) -> list[Tracker]:
    """The trackers of a run, ready for figures; `console` and `jsonl` are always among them.

    Args:
        names: value of `report_to`; "none" adds nothing, "all" adds every tracker whose package is installed.
    Raises:
        ConfigError: unknown name, missing package, or a service that refuses to start.
    """
    wanted = [name for name in _chosen(names) if name not in _ALWAYS]
    # the console comes last: its progress bar must not be on the screen when another one fails to start
    with ExitStack() as opened:
        trackers: list[Tracker] = []
        for name in (*wanted, *_ALWAYS):
            tracker: Tracker = registry.load(_PACKAGE, name, key="report_to").build(info)
            opened.callback(tracker.finish)
            trackers.append(tracker)
        opened.pop_all()
    return trackers


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing; to be called before anything large is loaded.

    Raises:
        ConfigError: unknown name or missing package.
    """
    for name in names:
        if name in ("none", "all"):
            continue
        package = registry.load(_PACKAGE, name, key="report_to").PACKAGE
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"report_to: {name} needs the package {package}, which is not installed. Install it with "
                f"`pip install {package}`, or leave it out of report_to."
            )


def _chosen(names: Sequence[str]) -> list[str]:
    chosen: dict[str, None] = {}
    for name in names:
        if name == "none":
            continue
        chosen |= dict.fromkeys(_installed() if name == "all" else [name])
    if "all" in names:
        log.info("report_to: all stands for %s", ", ".join(chosen))
    return list(chosen)


def _installed() -> list[str]:
    modules = {name: registry.load(_PACKAGE, name, key="report_to") for name in registry.names(_PACKAGE)}
    return [name for name, module in modules.items() if importlib.util.find_spec(module.PACKAGE) is not None]


def import_service(package: str, install: str) -> ModuleType:
    """Import a tracker's own package.

    Args:
        install: the command that installs it, in backquotes.
    Raises:
        ConfigError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"report_to: {package} cannot be imported ({error}). "
            f"Install it with {install}, or leave it out of report_to."
        ) from error


def public_config(info: RunInfo) -> dict[str, Any]:
    """The config as services may show it: without secrets, paths as text."""
    shown = {key: value for key, value in info.config.items() if not key.endswith(_SECRET)}
    return {key: str(value) if isinstance(value, Path) else value for key, value in shown.items()}


def grouped_name(name: str) -> str:
    """The name that dashboards group by, as Hugging Face's trainers write it: `train/loss`, `eval/loss`."""
    for split in ("eval", "test"):
        if name.startswith(f"{split}_"):
            return f"{split}/{name.removeprefix(f'{split}_')}"
    return f"train/{name}"
