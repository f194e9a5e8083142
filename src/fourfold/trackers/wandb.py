"""Weights & Biases, with Hugging Face's names (`train/loss` over `train/global_step`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fourfold.base.errors import ConfigError
from fourfold.base.extras import install_extra
from fourfold.trackers.interface import RunInfo, Tracker, grouped_name, import_service, public_config

PACKAGE = "wandb"

_STEP = "train/global_step"
_RUN_ID_FILE = "wandb_run_id.txt"


class Wandb(Tracker):
    """Writes every figure as a metric of one W&B run."""

    def __init__(self, run: Any) -> None:
        self._run, self._open = run, True

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({grouped_name(name): value for name, value in figures.items()} | {_STEP: step})

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """As a W&B table."""
        import wandb

        if rows:
            columns: list[Any] = list(rows[0])
            data: list[Any] = [[row[column] for column in columns] for row in rows]
            self._run.log({name: wandb.Table(columns=columns, data=data), _STEP: step})

    def finish(self) -> None:
        if self._open:
            self._open = False
            self._run.finish()


def build(info: RunInfo) -> Wandb:
    """A tracker on a new W&B run, or on the one that the resumed run wrote to.

    W&B's own environment variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...) are obeyed.

    Raises:
        ConfigError: wandb is not installed, or refuses to start (for example without a login).
    """
    wandb = import_service("wandb", install_extra("wandb"))
    id_file = info.output_dir / _RUN_ID_FILE
    resumed = id_file.read_text(encoding="utf-8").strip() if info.start_step and id_file.exists() else None
    info.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=_project(info),
            name=info.run_name,
            dir=str(info.output_dir),
            id=resumed,
            # offline runs cannot be continued: W&B joins the parts that have one id when they are synced
            resume="allow" if resumed else None,
            config=public_config(info),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"report_to: wandb does not start: {str(error).rstrip('.')}. Log in with `wandb login`, set "
            "WANDB_MODE=offline, or leave wandb out of report_to."
        ) from error
    id_file.write_text(run.id, encoding="utf-8")
    # figures carry their own step: W&B's counter would refuse the repeated steps of a resumed run
    run.define_metric(_STEP)
    run.define_metric("*", step_metric=_STEP, step_sync=True)
    return Wandb(run)


def _project(info: RunInfo) -> str | None:
    project = info.config.get("project")
    return project if isinstance(project, str) else None
