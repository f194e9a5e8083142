"""The data sets that come with the project: every entry can be trained, without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byte_tokenizer import make_byte_tokenizer
from data_folder import prepare_run
from fourfold.dataset.info import DatasetEntry, find_entries, load_info

DATA = Path(__file__).parents[2] / "data"
NAMES = sorted(load_info(DATA)[0])


def stage_of(entry: DatasetEntry) -> str:
    if entry.formatting == "text":
        return "pt"
    if entry.ranking:
        return "dpo"
    return "kto" if entry.columns.kto_tag else "sft"


@pytest.mark.parametrize("name", NAMES)
def test_shipped_entry_when_prepared_keeps_every_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    (entry,) = find_entries((name,), DATA, key="dataset")
    data = prepare_run(DATA, dataset=name, stage=stage_of(entry), output_dir=str(tmp_path), cutoff_len=4096).train
    assert data is not None
    stats = data.stats[name]
    assert stats.samples == stats.rows >= 40
    assert (stats.truncated, stats.dropped) == (0, {})


def test_shipped_files_when_listed_are_all_named_by_an_entry() -> None:
    info, _ = load_info(DATA)
    assert {path.name for path in DATA.iterdir()} == {"dataset_info.json", *(e["file_name"] for e in info.values())}


@pytest.mark.parametrize("name", ["identity", "instruction_en", "instruction_zh", "preference"])
def test_shipped_rows_when_compared_are_all_different(name: str) -> None:
    rows = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_identity_when_prepared_says_the_name_of_the_entry_or_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    for given, name in (({}, "Fourfold"), ({"name": "Ada", "author": "us"}, "Ada")):
        data = prepare_run(DATA, dataset="identity", dataset_vars=given, output_dir=str(tmp_path)).train
        assert data is not None
        tokenizer = make_byte_tokenizer("<|im_start|>", "<|im_end|>")
        assert f"I am {name}, an assistant made by" in str(tokenizer.decode(data[0].sequences[""].input_ids))
