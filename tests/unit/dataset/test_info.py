"""dataset_info.json: entries, columns, tags, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.info import Columns, Tags, find_entries, load_info, parse_entry


def entry(**raw: Any):
    return parse_entry("a", {"file_name": "a.json", **raw}, Path("data"))


def test_parse_entry_when_nothing_is_said_takes_the_defaults() -> None:
    parsed = entry()
    assert (parsed.source, parsed.location) == ("file", str(Path("data/a.json")))
    assert (parsed.formatting, parsed.ranking, parsed.split) == ("alpaca", False, "train")
    assert (parsed.columns, parsed.tags, parsed.has_columns) == (Columns(), Tags(), False)


def test_parse_entry_when_columns_are_given_leaves_the_others_out() -> None:
    parsed = entry(columns={"prompt": "text"}, tags={"role_tag": "role"})
    assert parsed.columns == Columns(prompt="text", query=None, response=None, messages=None)
    assert parsed.tags == Tags("role", None, None, None, None, None, None)


def test_parse_entry_when_formatting_is_openai_takes_its_names() -> None:
    parsed = entry(formatting="openai")
    assert parsed.columns.messages == "messages"
    assert (parsed.tags.role_tag, parsed.tags.content_tag, parsed.tags.observation_tag) == ("role", "content", "tool")


def test_parse_entry_when_file_is_plain_text_reads_its_one_column() -> None:
    parsed = parse_entry("a", {"file_name": "a.txt"}, Path())
    assert parsed.columns.prompt == "text"


def test_parse_entry_when_hub_and_other_sources_are_named_takes_the_hub() -> None:
    parsed = parse_entry("a", {"hf_hub_url": "some/set", "ms_hub_url": "x/y", "subset": "s", "num_samples": 3}, Path())
    assert (parsed.source, parsed.location, parsed.subset, parsed.num_samples) == ("hf_hub", "some/set", "s", 3)


@pytest.mark.parametrize(
    ("on", "raw", "found"),
    [
        ("1", {"hf_hub_url": "h/f", "ms_hub_url": "m/s"}, ("ms_hub", "m/s")),
        ("0", {"hf_hub_url": "h/f", "ms_hub_url": "m/s"}, ("hf_hub", "h/f")),
        ("0", {"ms_hub_url": "m/s", "file_name": "a.json"}, ("ms_hub", "m/s")),
        ("true", {"hf_hub_url": "h/f"}, ("hf_hub", "h/f")),
    ],
)
def test_parse_entry_when_modelscope_is_named_takes_it_if_in_use_or_alone(
    monkeypatch: pytest.MonkeyPatch, on: str, raw: dict[str, str], found: tuple[str, str]
) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", on)
    parsed = parse_entry("a", raw, Path())
    assert (parsed.source, parsed.location) == found
    (online,) = find_entries(("some/set",), "ONLINE", key="dataset")
    assert online.source == ("hf_hub" if on == "0" else "ms_hub")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "names no source. Add file_name"),
        ({"om_hub_url": "x/y"}, "om_hub_url: the Modelers hub is not supported. Download"),
        ({"script_url": "x.py"}, "script_url: loading scripts"),
        ({"cloud_file_name": "s3://x"}, "cloud_file_name: cloud storage"),
        ({"file_name": "a", "formatting": "alpacca"}, "formatting: 'alpacca' is not known. Did you mean alpaca?"),
        ({"file_name": "a", "columns": {"promt": "x"}}, "columns: 'promt' is not known. Did you mean prompt"),
        ({"file_name": "a", "columns": {"images": "x"}}, "images are not supported"),
        ({"file_name": "a", "ranking": "yes"}, "ranking: 'yes' is not of type bool"),
        ({"file_name": "a", "num_samples": 0}, "num_samples: 0 is not positive"),
        ({"file_name": "a", "placeholders": ["name"]}, "placeholders: must map"),
        (["a.json"], "must be a mapping"),
    ],
)
def test_parse_entry_when_it_cannot_be_used_says_why(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"entry 'a'") as caught:
        parse_entry("a", raw, Path())
    assert message in str(caught.value)


def test_parse_entry_when_a_setting_is_unknown_warns(caplog: pytest.LogCaptureFixture) -> None:
    entry(formating="sharegpt")
    assert "'formating' is not a setting. Did you mean formatting?" in caplog.text


def test_find_entries_when_names_are_unknown_lists_them_with_the_nearest() -> None:
    info = {"identity": {"file_name": "a.json"}, "alpaca_en": {"file_name": "b.json"}}
    with pytest.raises(ConfigError) as caught:
        find_entries(("identiy", "alpaca_en", "alpaca_em"), info, key="dataset")
    assert len(caught.value.problems) == 2
    assert "dataset: 'identiy' is not known. Did you mean identity?" in caught.value.problems[0]


def test_find_entries_when_online_takes_names_for_hub_ids() -> None:
    (found,) = find_entries(("some/set",), "ONLINE", key="dataset")
    assert (found.source, found.location, found.formatting) == ("hf_hub", "some/set", "alpaca")


def test_load_info_when_folder_or_file_is_missing_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset_dir: there is no folder '.*nowhere'"):
        load_info(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no dataset_info.json"):
        load_info(tmp_path)


def test_load_info_when_json_is_bad_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{\n "a": {},\n "b" 1\n}')
    with pytest.raises(DataError, match=r"dataset_info.json: bad JSON in line 3"):
        load_info(tmp_path)
