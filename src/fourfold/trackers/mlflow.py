"""MLflow; the server and the experiment are chosen by MLflow's own environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from fourfold.base.errors import ConfigError
from fourfold.trackers.interface import RunInfo, Tracker, import_service, public_config

PACKAGE = "mlflow"

_MAX_PARAM_LENGTH = 500
_PARAMS_PER_CALL = 100


class MLflow(Tracker):
    """Writes every figure as a metric of one MLflow run."""

    def __init__(self, mlflow: ModuleType) -> None:
        self._mlflow, self._open = mlflow, True

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        # not synchronous: a slow server must not hold the training up
        self._mlflow.log_metrics(dict(figures), step=step, synchronous=False)

    def finish(self) -> None:
        if self._open:
            self._open = False
            self._mlflow.end_run()


def build(info: RunInfo) -> MLflow:
    """A tracker on a new MLflow run.

    Raises:
        ConfigError: mlflow is not installed, or its server does not answer.
    """
    mlflow = import_service("mlflow", "`pip install mlflow`")
    try:
        mlflow.start_run(run_name=info.run_name)
        params = {key: str(value)[:_MAX_PARAM_LENGTH] for key, value in public_config(info).items()}
        keys = list(params)
        for start in range(0, len(keys), _PARAMS_PER_CALL):
            mlflow.log_params({key: params[key] for key in keys[start : start + _PARAMS_PER_CALL]})
    except mlflow.exceptions.MlflowException as error:
        raise ConfigError(
            f"report_to: mlflow does not start: {str(error).rstrip('.')}. Check MLFLOW_TRACKING_URI, or leave mlflow "
            "out of report_to."
        ) from error
    return MLflow(mlflow)
