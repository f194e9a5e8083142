"""The verb `train`: from a checked config to a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.checkpoint.folder import full_disk_told
from fourfold.config.schema import Run
from fourfold.trackers.interface import check_installed
from fourfold.trackers.reports.plot import plot_losses
from fourfold.trackers.reports.results import Split, format_results, write_results
from fourfold.training import folder
from fourfold.training.assemble import Parts, load_parts
from fourfold.training.evaluate import Evaluator
from fourfold.training.fit import fit
from fourfold.training.predict import generate_predictions

log = get_logger(__name__)


def train(run: Run) -> dict[str, Any]:
    """Train, evaluate and predict as `do_train`, `do_eval` and `do_predict` say.

    Returns:
        the figures of all_results.json.
    Raises:
        FourfoldError: whatever is the user's to settle.
    """
    output_dir = folder.claim(run)
    check_installed(run.output.report_to)
    parts = load_parts(run, output_dir)
    _check_data(parts)
    with full_disk_told(output_dir):
        return _work(parts)


def _work(parts: Parts) -> dict[str, Any]:
    """What `train` does once everything is loaded."""
    run, output_dir, training = parts.run, parts.output_dir, parts.run.training
    folder.begin_anew(output_dir, run)
    folder.record(output_dir, run, parts.data.fingerprints, parts.layout.as_dict())
    results: dict[str, Any] = {}
    if training.do_train:
        results |= _report(output_dir, "train", fit(parts))
        if run.output.plot_loss:
            for path in plot_losses(output_dir):
                log.info("Figure saved at %s", path)
    if training.do_eval:
        results |= _report(output_dir, "eval", _evaluator(parts).run("eval"))
    if training.do_predict:
        figures = _evaluator(parts).run("predict")
        if training.predict_with_generate:
            figures |= generate_predictions(parts)
        results |= _report(output_dir, "predict", figures)
    return results


def _check_data(parts: Parts) -> None:
    """Refuse, before anything is computed, what saved data (tokenized_path) may lack.

    Raises:
        ConfigError: nothing to train or to evaluate on, though the config asks for it.
    """
    run, data = parts.run, parts.data
    if run.training.do_train and data.train is None and data.stream is None:
        raise ConfigError("dataset: there is nothing to train on. Name a data set of dataset_info.json.")
    if (run.training.do_eval or run.training.do_predict) and not data.eval:
        raise ConfigError("eval_dataset: there is nothing to evaluate on. Name a data set, or set val_size.")


def _evaluator(parts: Parts) -> Evaluator:
    return Evaluator(
        parts.module, parts.step(), parts.data.eval, parts.policy, parts.run.training.per_device_eval_batch_size
    )


def _report(output_dir: Path, split: Split, figures: dict[str, float]) -> dict[str, float]:
    write_results(output_dir, split, figures)
    for line in format_results(split, figures).splitlines():
        log.info(line)
    return figures
