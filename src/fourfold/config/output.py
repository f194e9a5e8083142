"""Keys of what a run leaves behind: checkpoints, logs and plots."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.key import CommaList, Count, Folder, LocalPath, Section, key, later
from fourfold.version import SCHEMA_VERSION


class OutputConfig(Section):
    """The run's folder, its checkpoints, logs and trackers."""

    title: ClassVar[str] = "Output"

    output_dir: LocalPath | None = key(None, "The run's folder: adapter or model, checkpoints, logs, config.")
    overwrite_output_dir: bool = key(False, "Begin anew in a folder that already holds a run.")
    resume_from_checkpoint: bool | LocalPath | None = key(
        None, "Checkpoint folder to go on from, or true for the newest in output_dir."
    )
    save_strategy: Literal["steps", "epoch", "best", "no"] = key(
        "steps", "When checkpoints are written; the last step is always saved."
    )
    save_steps: Count = key(500, "Steps between checkpoints; below 1 a share of all steps.", gt=0)
    save_total_limit: int | None = key(None, "Keep this many checkpoints; default: all.", ge=1)
    save_only_model: bool = key(False, "Checkpoints without optimizer state; a run cannot resume from them.")
    save_sharded: Literal["auto"] | bool = key(
        "auto", "Each rank writes its part of the checkpoints; auto: if the ranks share a large model."
    )
    async_save: bool = key(False, "Write checkpoints beside the training; they are sharded then.")

    logging_strategy: Literal["steps", "epoch", "no"] = key("steps", "When figures are logged.", group="Logging")
    logging_steps: Count = key(500, "Steps between logs; below 1 a share of all steps.", group="Logging", gt=0)
    logging_first_step: bool = key(False, "Log the first step too.", group="Logging")
    report_to: CommaList = key(
        (),
        "Trackers, comma-separated; none or all. The console and trainer_log.jsonl always get the figures.",
        group="Logging",
        folder=Folder("fourfold.trackers"),
        also=("none", "all"),
    )
    run_name: str | None = key(None, "A name for people; default: output_dir.", group="Logging")
    plot_loss: bool = key(False, "Write the loss curve as training_loss.png.", group="Logging")
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] | bool = key(
        "no", "Count input tokens in the logs; true means all.", group="Logging"
    )
    include_effective_tokens_per_second: bool = key(
        False, "Log trained tokens (padding left out) per second at the end.", group="Logging"
    )
    log_level: Literal["passive", "detail", "debug", "info", "warning", "error", "critical"] = key(
        "passive", "How much is printed; passive means info.", group="Logging"
    )
    disable_tqdm: bool | None = key(None, "Plain lines instead of a progress bar.", group="Logging")

    project: str | None = key(None, "Project of the trackers that have projects.", group="Trackers")
    use_swanlab: bool = key(False, "Adds swanlab to report_to.", group="Trackers")
    swanlab_project: str | None = key(None, "SwanLab: project.", group="Trackers")
    swanlab_workspace: str | None = key(None, "SwanLab: workspace.", group="Trackers")
    swanlab_run_name: str | None = key(None, "SwanLab: name of the run; default: run_name.", group="Trackers")
    swanlab_mode: Literal["cloud", "local"] = key("cloud", "SwanLab: where figures are kept.", group="Trackers")
    swanlab_api_key: str | None = key(None, "SwanLab: key of the account.", group="Trackers", secret=True)
    swanlab_logdir: LocalPath | None = key(
        None, "SwanLab: folder of its logs; default: in output_dir.", group="Trackers"
    )
    swanlab_lark_webhook_url: str | None = later(
        None, "SwanLab: address that is told of the end of a run.", "notifications", group="Trackers", secret=True
    )
    swanlab_lark_secret: str | None = later(
        None, "SwanLab: secret of that address.", "notifications", group="Trackers", secret=True
    )
    schema_version: int = key(
        SCHEMA_VERSION, "Version of the keys that a config file was written for.", ge=1, le=SCHEMA_VERSION
    )
