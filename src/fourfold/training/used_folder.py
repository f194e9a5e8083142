"""Whether an output folder holds a run already. Needs no torch, so that it is told before that is imported."""

from __future__ import annotations

from pathlib import Path

from fourfold.base.errors import ConfigError
from fourfold.checkpoint.folder import list_checkpoints
from fourfold.config.schema import Run

PROGRESS = (
    "trainer_log.jsonl",
    "trainer_state.json",
    "train_results.json",
    "eval_results.json",
    "predict_results.json",
    "all_results.json",
)
"""Files that show, unless they are empty, that a run did something; a run that failed before has left none."""


def holds_run(folder: Path) -> bool:
    """Whether an earlier run left anything in a folder."""
    files = (folder / name for name in PROGRESS)
    return bool(list_checkpoints(folder)) or any(file.exists() and file.stat().st_size for file in files)


def check_unused(run: Run) -> None:
    """Refuse a folder that holds a run, unless the config says to resume or to overwrite it.

    Raises:
        ConfigError: names the three ways on.
    """
    output = run.output
    folder = Path(output.output_dir or "")
    if holds_run(folder) and not (output.resume_from_checkpoint or output.overwrite_output_dir):
        raise ConfigError(
            f"output_dir: {folder} already holds a run. Go on with it by resume_from_checkpoint=true, replace it "
            "by overwrite_output_dir=true, or name another folder."
        )
