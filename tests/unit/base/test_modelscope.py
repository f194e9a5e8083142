"""ModelScope's hub, by a package of the same functions that needs no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest

from data_folder import alpaca_rows, prepare_run, write_set
from fourfold.base.errors import ConfigError, DataError
from fourfold.base.modelscope import fetch_model
from fourfold.config.begin import begin
from fourfold.config.paths import names_hub
from fourfold.models.source import model_name


class _DataSet:
    """As modelscope.MsDataset: wraps one of `datasets`."""

    asked: dict[str, Any]

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    @classmethod
    def load(cls, **options: Any) -> _DataSet:
        cls.asked = options
        if options["dataset_name"] != "owner/set":
            raise RuntimeError("no such data set")
        return cls(alpaca_rows(4))

    def to_hf_dataset(self) -> datasets.Dataset:
        return datasets.Dataset.from_list(self._rows)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The package in place and in use, and what it was asked for."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(model_id: str, **options: Any) -> str:
        calls.append({"model_id": model_id, **options})
        if model_id == "owner/none":
            raise RuntimeError("404: no such model.\nmore")
        folder = tmp_path / "hub" / model_id
        folder.mkdir(parents=True, exist_ok=True)
        kind = "adapter_config.json" if "adapter" in model_id else "config.json"
        (folder / kind).write_text(json.dumps({"model_type": "llama"}))
        return str(folder)

    package = ModuleType("modelscope")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    package.MsDataset = _DataSet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    return calls


_KEYS: dict[str, Any] = {"output_dir": "out", "dataset": "a", "stage": "dpo"}


def test_begin_when_in_use_fetches_every_model_and_adapter(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    keys = {
        "model_name_or_path": "owner/model",
        "adapter_name_or_path": "owner/adapter,owner/adapter2",
        "ref_model": "owner/reference",
        "ms_hub_token": "secret",
        "cache_dir": str(tmp_path / "place"),
    }
    run = begin(None, {**_KEYS, **keys}, "train")
    hub = tmp_path / "hub" / "owner"
    assert run.model.model_name_or_path == str(hub / "model")
    assert run.model.adapter_name_or_path == (str(hub / "adapter"), str(hub / "adapter2"))
    assert run.preference.ref_model == str(hub / "reference")
    assert [call["model_id"] for call in asked] == [f"owner/{n}" for n in ("model", "adapter", "adapter2", "reference")]
    first = {"model_id": "owner/model", "revision": "master", "cache_dir": str(tmp_path / "place"), "token": "secret"}
    assert asked[0] == first
    assert not names_hub(run)
    assert "secret" not in json.dumps(run.flat())
    assert model_name(run.model) == str(hub / "model")
    assert len(asked) == 4


def test_begin_when_only_the_tokenizer_is_needed_leaves_weights_out(asked: list[dict[str, Any]]) -> None:
    begin(None, {"model_name_or_path": "owner/model", "dataset": "a", "model_revision": "v1"}, "data")
    assert asked[0]["revision"] == "v1"
    assert "*.safetensors" in asked[0]["ignore_file_pattern"]


def test_begin_when_a_fetched_name_is_something_else_says_so(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="model_name_or_path: .*owner/adapter holds an adapter, not a model"):
        begin(None, {**_KEYS, "model_name_or_path": "owner/adapter"}, "train")


def test_fetch_when_there_is_no_such_model_names_key_and_name(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache_dir": None, "token": None}
    with pytest.raises(ConfigError) as caught:
        fetch_model("owner/none", "teacher_model", **options)
    assert str(caught.value).startswith(
        "teacher_model: owner/none cannot be fetched from ModelScope (404: no such model)."
    )
    assert fetch_model(str(tmp_path), "teacher_model", **options) == str(tmp_path)  # a folder is as it is
    assert len(asked) == 1


def test_fetch_when_the_package_is_absent_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "true")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match=r"USE_MODELSCOPE_HUB: .* Run `pip install modelscope`"):
        begin(None, {**_KEYS, "model_name_or_path": "owner/model"}, "train")


def test_begin_when_openmind_is_asked_for_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USE_OPENMIND_HUB", "1")
    run = begin(None, {**_KEYS, "model_name_or_path": "owner/model"}, "train")
    assert run.model.model_name_or_path == "owner/model"
    assert capsys.readouterr().err.count("USE_OPENMIND_HUB: the Modelers hub is not supported") == 1


def test_prepare_when_a_set_lies_on_modelscope_tokenises_it(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    info = {"there": {"ms_hub_url": "owner/set", "subset": "s"}, "none": {"ms_hub_url": "owner/none"}}
    from_hub = prepare_run(tmp_path, dataset_dir=info, dataset="there", ms_hub_token="secret").train
    from_file = prepare_run(write_set(tmp_path / "data", "a", alpaca_rows(4)), dataset="a").train
    assert from_hub is not None
    assert from_file is not None
    assert [from_hub[n] for n in range(4)] == [from_file[n] for n in range(4)]
    asked_for = {"dataset_name": "owner/set", "subset_name": "s", "split": "train", "token": "secret"}
    assert asked_for.items() <= _DataSet.asked.items()
    with pytest.raises(
        DataError, match=r"owner/none: the data set cannot be loaded from ModelScope \(no such data set\)"
    ):
        prepare_run(tmp_path, dataset_dir=info, dataset="none")
