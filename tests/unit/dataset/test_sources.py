"""Files of rows and data sets made of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_folder import alpaca_rows, write_rows
from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset import readers
from fourfold.dataset.info import DatasetEntry, parse_entry
from fourfold.dataset.json_scan import scan_rows
from fourfold.dataset.readers import open_file, stream_file
from fourfold.dataset.sources import OpenOptions, open_source, stream_source

ROWS = [{"instruction": f"q{n}", "input": "", "output": "äöü 你好" * n} for n in range(7)]


def write_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=3)
        case ".arrow":
            with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
        case ".csv":
            lines = [",".join(json.dumps(value, ensure_ascii=False) for value in row.values()) for row in rows]
            path.write_text("\n".join([",".join(rows[0]), *lines]), encoding="utf-8")
        case _:
            write_rows(path, rows)
    return path


def entry_of(path: Path, **raw: Any) -> DatasetEntry:
    return parse_entry("a", {"file_name": path.name, **raw}, path.parent)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "arrow", "csv"])
def test_open_file_of_every_kind_reads_rows_in_any_order_here_and_in_another_process(tmp_path: Path, kind: str) -> None:
    path = write_file(tmp_path / f"rows.{kind}", ROWS)
    reader = open_file(path)
    assert len(reader) == 7
    assert reader.read([5, 0, 3]) == [ROWS[5], ROWS[0], ROWS[3]]
    assert pickle.loads(pickle.dumps(reader)).read(range(2, 5)) == ROWS[2:5]
    assert list(stream_file(path)) == ROWS


def test_open_file_when_text_takes_lines_for_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\ntwo\n".encode())
    assert open_file(path).read(range(3)) == [{"text": "one"}, {"text": ""}, {"text": "two"}]
    assert len(open_file(path)) == 3


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 22])
def test_scan_rows_whatever_is_read_at_a_time_finds_rows_and_their_bytes(tmp_path: Path, chunk_bytes: int) -> None:
    for text in (json.dumps(ROWS, indent=2, ensure_ascii=False), "\n".join(json.dumps(row, indent=1) for row in ROWS)):
        path = tmp_path / "a.json"
        path.write_text(f"\ufeff {text} \n", encoding="utf-8")
        data = path.read_bytes()
        found = list(scan_rows(path, chunk_bytes=chunk_bytes))
        assert [row for row, _, _ in found] == ROWS
        assert [json.loads(data[start:stop]) for _, start, stop in found] == ROWS


@pytest.mark.parametrize("chunk_bytes", [5, 1 << 22])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', "bad JSON in line 3: Expecting ':' delimiter"),
        ('[\n{"a": 1},\n{"a": 2}\n', "bad JSON in line 4: the array is not closed"),
        ('[{"a": 1}]\n\n{"b": 2}', "bad JSON in line 3: text after the end of the array"),
        ('{"a": 1}\n{"a": "x', "bad JSON in line 2: Unterminated string"),
    ],
)
def test_scan_rows_when_json_is_bad_names_the_line(tmp_path: Path, text: str, message: str, chunk_bytes: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(scan_rows(path, chunk_bytes=chunk_bytes))
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("scanned_bytes", [1, 7, 64])
def test_open_file_whatever_is_scanned_at_a_time_finds_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned_bytes: int
) -> None:
    monkeypatch.setattr(readers, "_SCANNED_BYTES", scanned_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\r\n\r\n  \n{"a": 3}')
    reader = open_file(path)
    assert reader.read(range(len(reader))) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_open_file_when_a_line_is_bad_names_it_as_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": }\n')
    reader = open_file(path)
    assert len(reader) == 2
    with pytest.raises(DataError, match=r"a.jsonl: bad JSON in line 4"):
        reader.read([1])
    with pytest.raises(DataError, match=r"a.jsonl: bad JSON in line 4"):
        list(stream_file(path))


def test_open_file_when_not_utf8_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match=r"a.json: is not UTF-8"):
        open_file(path)


def test_open_file_when_kind_is_unknown_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.xlsx' are not read. Use one of: json, jsonl"):
        open_file(tmp_path / "a.xlsx")


def test_open_file_when_parquet_is_damaged_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is not a valid parquet file"):
        open_file(path)


def test_open_source_when_folder_joins_its_files_and_names_the_right_one(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    write_file(folder / "b.jsonl", ROWS[4:])
    write_file(folder / "a.json", ROWS[:4])
    (folder / "notes.md").write_text("no data")
    rows = open_source(entry_of(folder), OpenOptions())
    assert rows.read(np.array([6, 1, 4])) == [ROWS[6], ROWS[1], ROWS[4]]
    assert rows.where(5) == (str(folder / "b.jsonl"), 1)


def test_open_source_when_max_samples_is_given_takes_the_first_rows(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.json", ROWS)
    assert len(open_source(entry_of(path), OpenOptions(max_samples=3))) == 3
    assert len(open_source(entry_of(path), OpenOptions(max_samples=30))) == 7


def test_open_source_when_num_samples_is_given_draws_rows_by_seed(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.json", ROWS)
    few = open_source(entry_of(path, num_samples=5), OpenOptions(seed=1))
    many = open_source(entry_of(path, num_samples=10), OpenOptions(seed=1))
    assert few.chosen is not None
    assert len(set(few.chosen.tolist())) == 5
    assert many.chosen is not None
    assert set(many.chosen.tolist()) == set(range(7))
    assert len(many) == 10


def test_open_source_when_a_file_changes_has_another_digest(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.json", ROWS)
    first = open_source(entry_of(path), OpenOptions()).digest
    assert open_source(entry_of(path), OpenOptions()).digest == first
    write_file(path, ROWS[:-1])
    assert open_source(entry_of(path), OpenOptions()).digest != first


def test_open_source_when_file_is_missing_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: there is no such file or folder. Correct file_name of data set"):
        open_source(entry_of(tmp_path / "none.json"), OpenOptions())


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.json", " "), ("a.jsonl", "\n"), ("a.txt", "")])
def test_open_source_when_empty_says_so(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="data set 'a' is empty"):
        open_source(entry_of(tmp_path / name), OpenOptions())


def test_open_source_when_a_column_does_not_exist_lists_those_that_do(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.json", ROWS)
    with pytest.raises(DataError, match=r"response is in column 'answer', which is not there. Use one of: input, in"):
        open_source(entry_of(path, columns={"prompt": "instruction", "response": "answer"}), OpenOptions())


def test_open_source_when_loaded_from_a_hub_folder_reads_split_and_rows(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "part").mkdir(parents=True)
    write_file(repo / "part" / "train.jsonl", ROWS)
    entry = parse_entry("h", {"hf_hub_url": str(repo), "folder": "part"}, Path())
    options = OpenOptions(cache_dir=str(tmp_path / "cache"), max_samples=4)
    rows = open_source(entry, options)
    assert rows.read(np.array([3, 1])) == [ROWS[3], ROWS[1]]
    assert [raw for raw, _, _ in stream_source(entry, options)] == ROWS[:4]


def test_open_source_when_hub_set_is_missing_says_what_to_check(tmp_path: Path) -> None:
    entry = parse_entry("h", {"hf_hub_url": str(tmp_path / "nothing")}, Path())
    with pytest.raises(DataError, match="data set 'h' cannot be loaded from the hub"):
        open_source(entry, OpenOptions(cache_dir=str(tmp_path)))


def identity(share: float, text: str = "I am {{name}} of {{author}}.") -> list[dict[str, Any]]:
    rows = alpaca_rows(100)
    for row in rows[: round(share * 100)]:
        row["output"] = text
    return rows


def test_open_source_when_prose_has_placeholders_fills_them_from_the_config(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.json", identity(0.5))
    rows = open_source(entry_of(path), OpenOptions({"name": "Ada", "author": "us"}))
    assert rows.read(np.array([0]))[0]["output"] == "I am Ada of us."


def test_open_source_when_nothing_fills_a_placeholder_shows_the_line_to_add(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.json", identity(0.5))
    with pytest.raises(
        ConfigError, match=r"\{\{author\}\} and nothing fills .* dataset_vars: \{name: ..., author: ...\}"
    ):
        open_source(entry_of(path), OpenOptions({"name": "Ada"}))


def test_open_source_when_few_rows_have_placeholders_leaves_them_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = write_file(tmp_path / "a.json", identity(0.03))
    rows = open_source(entry_of(path), OpenOptions({"name": "Ada"}))
    assert rows.read(np.array([0]))[0]["output"] == "I am {{name}} of {{author}}."
    assert "3 of 100 rows looked at hold {{author}} or {{name}}; they are left as they are" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "```jinja\nHello {{name}}\n```",
        "Write `{{name}}` where the name goes.",
        "<h1>{{name}}</h1>",
        "{% if name %}{{name}}{% endif %}",
        "{{ name }} by {{ author }}",
        "{{title}} {{x}}",
    ],
)
def test_open_source_when_rows_show_code_leaves_them(tmp_path: Path, text: str) -> None:
    path = write_file(tmp_path / "a.json", identity(1.0, text))
    rows = open_source(entry_of(path), OpenOptions({"author": "us"}))
    assert rows.read(np.array([0]))[0]["output"] == text


def test_open_source_when_entry_has_placeholders_obeys_it(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.json", identity(0.01, "{{name}} of {{author}} and {{team}}"))
    declared = {"name": "Ada", "team": None}
    with pytest.raises(ConfigError, match=r"\{\{team\}\} and nothing fills"):
        open_source(entry_of(path, placeholders=declared), OpenOptions())
    filled = open_source(entry_of(path, placeholders=declared), OpenOptions({"team": "A", "name": "Bo"}))
    assert filled.read(np.array([0]))[0]["output"] == "Bo of {{author}} and A"
    path = write_file(tmp_path / "a.json", identity(1.0))
    literal = open_source(entry_of(path, placeholders={}), OpenOptions({"name": "Ada"}))
    assert literal.read(np.array([0]))[0]["output"] == "I am {{name}} of {{author}}."
