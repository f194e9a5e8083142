from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fourfold.base.errors import ModelError
from fourfold.config.model import ModelConfig
from fourfold.models.identity import BaseIdentity, identify, read_identity, write_identity
from fourfold.models.weights import save_model
from tiny_models import Load, save_tiny_model


def _identify(folder: Path) -> BaseIdentity:
    identity = identify(ModelConfig(model_name_or_path=str(folder)))
    assert identity is not None
    return identity


def test_identify_does_not_depend_on_dtype_or_sharding(tmp_path: Path, llama_folder: Path, load: Load) -> None:
    reference = _identify(llama_folder)
    model, _ = load()
    save_model(model, tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert _identify(tmp_path / "sharded").weights == reference.weights
    save_model(model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert _identify(tmp_path / "bf16").weights == reference.weights


def test_identify_tells_other_weights_apart(tmp_path: Path, llama_folder: Path) -> None:
    other = _identify(save_tiny_model(tmp_path, seed=1))
    assert not other.same_weights(_identify(llama_folder))


def test_identify_from_scratch_is_none(llama_folder: Path) -> None:
    assert identify(ModelConfig(model_name_or_path=str(llama_folder), train_from_scratch=True)) is None


def test_identity_is_written_and_read_back(tmp_path: Path) -> None:
    identity = BaseIdentity("some/model", "abc", "def", ("first", "second"))
    write_identity(tmp_path, identity)
    assert read_identity(str(tmp_path), ModelConfig()) == identity
    assert read_identity(str(tmp_path.parent), ModelConfig(adapter_folder=tmp_path.name)) == identity


def test_read_identity_when_there_is_none_gives_none(tmp_path: Path) -> None:
    assert read_identity(str(tmp_path), ModelConfig()) is None


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is damaged"), (json.dumps({"format_version": 99}), "has format_version 99")]
)
def test_read_identity_when_it_cannot_be_used_says_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "fourfold.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_identity(str(tmp_path), ModelConfig())
