"""SwanLab, with Hugging Face's names (`train/loss`); obeys the `swanlab_*` keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fourfold.base.errors import ConfigError
from fourfold.trackers.interface import RunInfo, Tracker, grouped_name, import_service, public_config

PACKAGE = "swanlab"

_OPTIONS = {"swanlab_project": "project", "swanlab_workspace": "workspace", "swanlab_mode": "mode"}


class SwanLab(Tracker):
    """Writes every figure as a metric of one SwanLab experiment."""

    def __init__(self, swanlab: ModuleType) -> None:
        self._swanlab, self._open = swanlab, True

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._swanlab.log({grouped_name(name): value for name, value in figures.items()}, step=step)

    def finish(self) -> None:
        if self._open:
            self._open = False
            self._swanlab.finish()


def build(info: RunInfo) -> SwanLab:
    """A tracker on a new SwanLab experiment.

    Raises:
        ConfigError: swanlab is not installed, or refuses to start (for example without a login).
    """
    swanlab = import_service("swanlab", "`pip install swanlab`")
    given = {name: info.config.get(key) for key, name in _OPTIONS.items()}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        if key := info.secrets.get("swanlab_api_key"):
            swanlab.login(api_key=key)
        swanlab.init(
            experiment_name=info.config.get("swanlab_run_name") or info.run_name,
            logdir=info.config.get("swanlab_logdir") or str(info.output_dir / "swanlog"),
            config=public_config(info),
            **options,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"report_to: swanlab does not start: {str(error).rstrip('.')}. Give swanlab_api_key, use "
            "swanlab_mode: local, or leave swanlab out of report_to."
        ) from error
    return SwanLab(swanlab)
