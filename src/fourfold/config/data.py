"""Keys of the data: which sets, how they are mixed, rendered, cut and packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from fourfold.config.key import CommaFloats, CommaList, Folder, LocalPath, Options, Section, Status, key, later


class DataConfig(Section):
    """Data sets, templates, length, packing and preprocessing."""

    title: ClassVar[str] = "Data"

    dataset: CommaList = key((), "Data sets to train on: names in dataset_info.json, comma-separated.")
    eval_dataset: CommaList = key((), "Data sets to evaluate on, comma-separated.")
    dataset_dir: LocalPath | Mapping[str, Any] = key(
        "data",
        "Folder with dataset_info.json; ONLINE for hub ids; REMOTE:repo; or the entries themselves as a mapping.",
    )
    dataset_vars: Options = key({}, "Values for placeholders in the data: {name: ...} fills `{{name}}`.")
    max_samples: int | None = key(None, "Use at most this many rows of each data set.", ge=1)
    val_size: float = key(
        0.0, "Rows held out for evaluation: below 1 a share, else a number; of what dataset names.", ge=0
    )
    eval_on_each_dataset: bool = key(False, "Evaluate on each of eval_dataset apart.")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = key(
        "concat",
        "How several sets are joined: one after the other, or interleaved until the first (under) or the last (over) "
        "is exhausted, or once through all.",
    )
    interleave_probs: CommaFloats = key((), "Probability of each set when interleaving, comma-separated.")
    streaming: bool = key(False, "Read rows while training instead of all before. Needs max_steps.")
    buffer_size: int = key(16384, "Rows held to shuffle from when streaming.", ge=1)
    data_shared_file_system: bool = later(
        False, "All nodes see the same folder, so one of them prepares the data.", "one node preparing data for all"
    )
    skip_bad_rows: bool = key(False, "Skip and count rows with missing fields instead of stopping at the first.")

    template: str = key(
        "auto",
        "How a conversation becomes text; auto takes the model's own chat template.",
        group="Template",
        folder=Folder("fourfold.dataset.templates", ".jinja"),
        also=("auto",),
        otherwise="template: auto takes the model's own chat template.",
    )
    tool_format: str | None = key(None, "Format of tool calls; default: the template's own.", group="Template")
    default_system: str | None = key(None, "System prompt for rows that have none.", group="Template")
    enable_thinking: bool | None = key(
        True,
        "Reasoning models: true trains an empty thought, false puts it into the prompt, null leaves rows as is.",
        group="Template",
    )
    preserve_thinking: bool = key(False, "Keep the thoughts of earlier turns in the prompt.", group="Template")

    cutoff_len: int = key(2048, "Longest sequence, in tokens; longer ones are cut per turn.", group="Length", ge=1)
    packing: bool | None = key(
        None,
        "Put several samples into one sequence; they never see each other. Default: on for stage pt.",
        group="Length",
    )
    neat_packing: bool = key(
        False, "Turns packing on. Packed samples never see each other in either case.", group="Length"
    )
    train_on_prompt: bool = key(False, "Train on the prompt's tokens too (stage sft).", group="Length")
    mask_history: bool = key(False, "Train on the last answer only (stage sft).", group="Length")
    ignore_pad_token_for_loss: bool = key(
        True,
        "Do not train on padding.",
        group="Length",
        status=Status.MAPPED,
        note="padding is never trained",
    )

    overwrite_cache: bool = key(False, "Tokenise again although a cache of this data exists.", group="Preprocessing")
    preprocessing_batch_size: int = key(1000, "Rows tokenised at a time.", group="Preprocessing", ge=1)
    preprocessing_num_workers: int | None = key(
        None, "Processes that tokenise; default: as many as cores, at most 16.", group="Preprocessing", ge=1
    )
    tokenized_path: LocalPath | None = key(
        None, "Folder to load tokenised data from, or to save it to if it is not there.", group="Preprocessing"
    )
