"""Shapes are kept by what they are made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fourfold.config.model import ModelConfig
from fourfold.planning.known_shape import find_shape, model_content
from fourfold.planning.shape import ModelShape


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shapes"


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return ModelConfig(model_name_or_path=str(tmp_path / "model"))


def _unused() -> ModelShape:
    raise AssertionError("the shape was read, though it is known")


def test_shape_when_seen_before_is_not_read(
    cache: Path, model: ModelConfig, shape_of: Callable[[str], ModelShape]
) -> None:
    shape = shape_of("gpt-oss-20b")
    assert find_shape(model, lambda: shape) == shape
    assert find_shape(model, _unused) == shape
    assert [file.suffix for file in cache.iterdir()] == [".json"]


def test_shape_when_the_config_changes_is_read_again(
    cache: Path, model: ModelConfig, shape_of: Callable[[str], ModelShape]
) -> None:
    find_shape(model, lambda: shape_of("Llama-3-8B"))
    file = Path(str(model.model_name_or_path)) / "config.json"
    file.write_text('{"model_type": "qwen3"}', encoding="utf-8")
    assert find_shape(model, lambda: shape_of("Qwen3-8B")) == shape_of("Qwen3-8B")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 0}'])
def test_shape_when_the_file_is_damaged_is_read_again(
    cache: Path, model: ModelConfig, damage: str, shape_of: Callable[[str], ModelShape]
) -> None:
    shape = shape_of("Llama-3-8B")
    find_shape(model, lambda: shape)
    (file,) = cache.iterdir()
    file.write_text(damage, encoding="utf-8")
    assert find_shape(model, lambda: shape) == shape
    assert json.loads(file.read_text(encoding="utf-8"))["hidden"] == 4096


def test_shape_when_the_cache_cannot_be_written_is_still_read(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, shape_of: Callable[[str], ModelShape]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "file"))
    assert find_shape(model, lambda: shape_of("Llama-3-8B")) == shape_of("Llama-3-8B")


def test_content_when_the_model_is_a_hubs_is_what_was_fetched(tmp_path: Path) -> None:
    model = ModelConfig(model_name_or_path="owner/name", cache_dir=str(tmp_path))
    assert model_content(model) is None
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc", encoding="utf-8")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}", encoding="utf-8")
    assert model_content(model) == b"{}"
    pinned = ModelConfig(model_name_or_path="owner/name", cache_dir=str(tmp_path), model_revision="abc")
    assert model_content(pinned) == b"{}"


def test_content_when_the_model_is_a_gguf_file_is_its_head_and_length(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF-head")
    assert model_content(ModelConfig(model_name_or_path=str(tmp_path / "model.gguf"))) == b"GGUF-head9"
