"""What is wrong with data is told in one clear line, with the file and the place; exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import Refuse, run_here
from data_folder import write_set

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("a.json", "[]", ": data set 'a' is empty. Add rows or leave it out."),
        ("a.jsonl", "", ": data set 'a' is empty. Add rows or leave it out."),
        ("a.csv", "instruction,output\n", ": data set 'a' is empty. Add rows or leave it out."),
        (
            "a.json",
            '[{"instruction": "a", "output": "b"},\n{"instruction" "a"}]',
            ": bad JSON in line 2: Expecting ':'",
        ),
        ("a.json", '[{"instruction": "a", "output": "b"},', ": bad JSON in line 1: the array is not closed."),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instr\n', ": bad JSON in line 2: Unterminated string"),
        ("a.parquet", "none", ": is not a valid parquet file"),
        ("a.csv", "instruction,output\na\n", ": is not a valid csv file"),
        ("a.doc", "none", ": files of kind '.doc' are not read. Use one of: "),
        ("a.json", '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', ", row 2: 'output' is missing"),
        ("a.json", '[{"instruction": "a", "output": 7}]', ", row 1: 'output' must be a text, not 7"),
        ("a.json", "[1]", ", row 1: must be an object, not 1"),
    ],
)
def test_train_when_a_data_file_is_bad_names_file_and_place(
    refuse: Refuse, tmp_path: Path, file: str, text: str, expected: str
) -> None:
    folder = write_set(tmp_path / "data", "a", [], file=file)
    (folder / file).write_text(text, encoding="utf-8")
    line = refuse(f"dataset_dir={folder}", "dataset=a")
    assert line.startswith(f"{folder / file}{expected}"), line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": {"file_name": "gone.json"}}', "gone.json: there is no such file or folder. Correct file_name of data"),
        ('{"a": {"file_name": "x",}}', "dataset_info.json: bad JSON in line 1: "),
        ('{"a": {"filename": "a.json"}}', "dataset_info.json: entry 'a': names no source. Add file_name"),
        ('{"a": {"file_name": "a.json", "formatting": "alpacca"}}', "'alpacca' is not known. Did you mean alpaca?"),
        ('{"a": {"file_name": "a.json", "columns": {"promt": "q"}}}', "'promt' is not known. Did you mean prompt?"),
        ('{"a": {"file_name": "a.json", "ranking": true}}', "stage: data set 'a' holds preference pairs, which sft"),
        ('{"a": {"file_name": "a.json", "columns": {"prompt": "q", "response": "output"}}}', "'q', which is not there"),
        (
            '{"a": {"file_name": "a.json", "columns": {"prompt": "instruction"}}}',
            "'a' names no column for its response",
        ),
        ('{"alpha": {"file_name": "a.json"}}', "dataset: 'a' is not known. Use one of: alpha."),
        ("[]", "dataset_info.json: must be a mapping of data set names to entries."),
        (None, "holds no dataset_info.json. Add it"),
    ],
)
def test_train_when_an_entry_is_wrong_says_what_is_missing(
    refuse: Refuse, tmp_path: Path, text: str | None, expected: str
) -> None:
    folder = write_set(tmp_path / "data", "a", [{"instruction": "a", "output": "b"}])
    (folder / "dataset_info.json").unlink()
    if text is not None:
        (folder / "dataset_info.json").write_text(text, encoding="utf-8")
    assert expected in refuse(f"dataset_dir={folder}", "dataset=a")


def test_train_when_bad_rows_may_be_skipped_counts_them(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c"}, {"output": "d"}]
    folder = write_set(tmp_path / "data", "a", rows)
    asked = [f"dataset_dir={folder}", "dataset=a", "skip_bad_rows=true"]
    done = run_here(capsys, "train", *words, *asked)
    assert done.code == 0, done.err
    assert "dataset a (train): 1 of 3 rows" in done.err
    assert "warning: dataset a: 2 rows dropped (bad row)" in done.err
    assert f"{folder / 'a.json'}, row 2: 'output' is missing" in done.err
    again = run_here(capsys, "train", *words, *asked, "overwrite_output_dir=true")
    assert "warning: dataset a: 2 rows dropped (bad row)" in again.err  # also when it comes from the cache


def test_train_when_samples_are_too_long_truncates_drops_and_counts(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"instruction": "a", "output": "word " * 40},  # cut to fit
        {"instruction": "word " * 40, "output": "a b c"},  # its share of eight tokens leaves no room for the answer
    ]
    folder = write_set(tmp_path / "data", "a", rows)
    done = run_here(capsys, "train", *words, f"dataset_dir={folder}", "dataset=a", "cutoff_len=8")
    assert done.code == 0, done.err
    assert "dataset a (train): 1 of 2 rows, 8 tokens, " in done.err
    assert ", 1 rows truncated" in done.err
    assert "warning: dataset a: 1 rows dropped (nothing to train)" in done.err
    assert f"First row dropped (nothing to train): {folder / 'a.json'}, row 2" in done.err


def test_train_when_nothing_is_left_to_train_says_why(refuse: Refuse, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "data", "a", [{"instruction": "word " * 40, "output": "a b c"}] * 3)
    assert refuse(f"dataset_dir={folder}", "dataset=a", "cutoff_len=8") == (
        "dataset: none of the 3 rows of a can be trained: 3 have nothing to train. First: "
        f"{folder / 'a.json'}, row 1. Raise cutoff_len (8), or see that the rows have answers."
    )


def test_train_when_a_text_is_shorter_than_a_block_says_what_to_change(refuse: Refuse) -> None:
    line = refuse("stage=pt", "dataset=tiny_text", "cutoff_len=100000")
    assert line.startswith("cutoff_len: the 22 rows hold ")
    assert line.endswith("too few for one block of 100000. Lower cutoff_len, add text, or set `packing: false`.")


def test_train_when_placeholders_are_unfilled_shows_the_line_to_add(refuse: Refuse, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "data", "a", [{"instruction": "Who?", "output": "I am {{name}}."}])
    assert "Add this line to the config: dataset_vars: {name: ...}" in refuse(f"dataset_dir={folder}", "dataset=a")


def test_train_when_val_size_leaves_nothing_says_so(refuse: Refuse) -> None:
    assert refuse("val_size=22").startswith("val_size: 22 of 22 rows leaves 0 to train on and 22 to evaluate on.")
