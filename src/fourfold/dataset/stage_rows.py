"""What each stage trains on, and whether a data set has it. Needs neither torch nor the data's contents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fourfold.base.errors import ConfigError
from fourfold.base.hub import settle_hub
from fourfold.config.schema import Run
from fourfold.dataset.formats.interface import RowKind
from fourfold.dataset.info import DatasetEntry, check_location, find_entries

ROW_KINDS: Mapping[str, RowKind] = {
    "pt": "text",
    "sft": "chat",
    "rm": "preference",
    "dpo": "preference",
    "kto": "kto",
    "ppo": "prompt",
    "grpo": "prompt",
    "kd": "chat",
}
"""Stage -> what its rows are."""


def row_kind(stage: str) -> RowKind:
    """What the rows of a stage are.

    Raises:
        ConfigError: the stage has none known here.
    """
    if stage not in ROW_KINDS:
        raise ConfigError(f"stage: no rows are known for {stage!r}. Use one of: {', '.join(ROW_KINDS)}.")
    return ROW_KINDS[stage]


def check_stage(entry: DatasetEntry, stage: str) -> None:
    """Refuse a data set whose rows are of another kind than the stage's.

    Raises:
        ConfigError: says what is missing, or which stage the data set is for.
    """
    kind = row_kind(stage)
    where = f"stage: data set {entry.name!r}"
    if kind == "preference" and not entry.ranking:
        raise ConfigError(f"{where} has no preference pairs, which {stage} needs. Its entry must say `ranking: true`.")
    if kind != "preference" and entry.ranking:
        raise ConfigError(f"{where} holds preference pairs, which {stage} does not train on. Use stage dpo or rm.")
    if kind == "kto" and entry.columns.kto_tag is None:
        raise ConfigError(f"{where} has no tags, which kto needs. Its entry must name the column `kto_tag`.")
    if kind == "chat" and entry.columns.kto_tag is not None:
        raise ConfigError(f"{where} holds answers tagged good or bad, which {stage} does not train on. Use stage kto.")
    if kind == "chat" and entry.formatting == "alpaca" and entry.columns.response is None:
        raise ConfigError(
            f"{where} names no column for its response, which {stage} needs. Add `response` to its entry's columns, "
            "or use stage pt."
        )
    if kind != "text" and entry.formatting == "text":
        raise ConfigError(f"{where} holds plain text, which {stage} does not train on. Use stage pt.")


def check_named(run: Run) -> None:
    """Refuse data sets that a run names and cannot use, before anything heavy is imported.

    Raises:
        ConfigError: unknown names, entries that cannot be used, rows of another kind than the stage's; all of them.
        DataError: a file that is not there.
    """
    data = run.data
    if data.tokenized_path is not None and Path(data.tokenized_path).exists():
        return  # the data sets themselves are not needed
    problems: list[str] = []
    for key, names in (("dataset", data.dataset), ("eval_dataset", data.eval_dataset)):
        for name in names:
            try:
                (entry,) = find_entries((name,), data.dataset_dir, key=key)
                check_stage(entry, run.training.stage)
                if entry.source == "hf_hub":
                    settle_hub()
            except ConfigError as error:
                problems += (problem for problem in error.problems if problem not in problems)
            else:
                check_location(entry)
    if problems:
        raise ConfigError(problems)
