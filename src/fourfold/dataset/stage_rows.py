"""What each stage trains on, and whether a data set has it."""

from __future__ import annotations

from collections.abc import Mapping

from fourfold.base.errors import ConfigError
from fourfold.dataset.formats.interface import RowKind
from fourfold.dataset.info import DatasetEntry

ROW_KINDS: Mapping[str, RowKind] = {
    "pt": "text",
    "sft": "chat",
    "rm": "preference",
    "dpo": "preference",
    "kto": "kto",
    "ppo": "prompt",
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
    if kind != "text" and entry.formatting == "text":
        raise ConfigError(f"{where} holds plain text, which {stage} does not train on. Use stage pt.")
