"""The report of what will be trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from byte_tokenizer import make_byte_tokenizer
from data_folder import alpaca_rows, make_run, write_set
from fourfold.base.errors import ConfigError
from fourfold.dataset.render import Renderer
from fourfold.dataset.report import report
from fourfold.dataset.template import load_template


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


def report_of(folder: Path, **keys: object) -> str:
    run = make_run(folder, **keys)
    tokenizer = make_byte_tokenizer("<|im_start|>", "<|im_end|>")
    return report(run, tokenizer, Renderer(load_template(run.data.template, tokenizer), tokenizer))


def test_report_when_rows_are_truncated_and_dropped_counts_them_and_shows_the_first(tmp_path: Path) -> None:
    rows = [*alpaca_rows(3), {"instruction": "a"}, {"instruction": "q", "output": "a" * 300}]
    text = report_of(write_set(tmp_path, "a", rows), dataset="a", skip_bad_rows=True, cutoff_len=200)
    lines = text.splitlines()
    assert lines[0] == "Training data: 4 samples, 317 tokens, 210 trained"
    assert lines[2].split() == ["data", "set", "rows", "used", "tokens", "trained", "truncated", "dropped"]
    assert lines[3].split() == ["a", "5", "4", "317", "210", "1", "1"]
    assert "  dropped, bad row: 1" in lines
    assert "Lengths of 4 sequences (tokens): least 39, median 39, 95 % below 175, most 200" in lines
    assert any(line.split()[:4] == ["20", "to", "39", "3"] for line in lines)
    assert "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\nanswer 0<|im_end|>\n" in text
    assert text.endswith("labels:\nanswer 0<|im_end|>\n")
    assert [line for line in lines if line.endswith("ids:")] == ["input_ids:", "label_ids:"]


def test_report_when_packed_or_paired_or_streamed_says_so(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(4))
    packed = report_of(folder, dataset="a", packing=True)
    assert "Lengths of 4 documents, several to a sample" in packed
    assert "documents: [39, 39, 39, 39]" in packed
    streamed = report_of(folder, dataset="a", streaming=True, max_steps=1)
    assert "Training data: streamed, so nothing is counted." in streamed
    rows = [{"q": "1", "c": "good", "r": "bad"}]
    write_set(folder, "p", rows, ranking=True, columns={"prompt": "q", "chosen": "c", "rejected": "r"})
    assert "rejected_labels:\nbad<|im_end|>" in report_of(folder, dataset="p", stage="dpo")


def test_report_when_no_data_is_named_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset: no data set is named"):
        report_of(write_set(tmp_path, "a", alpaca_rows(1)))
