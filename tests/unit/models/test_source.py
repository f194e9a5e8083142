"""What is said where a model cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold.base.errors import ModelError
from fourfold.config.model import ModelConfig
from fourfold.models.load import load_config, load_model
from fourfold.models.source import explained
from tiny_models import save_tiny_model


def test_load_when_the_model_brings_code_says_how_to_trust_it(tmp_path: Path) -> None:
    config = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_config(ModelConfig(model_name_or_path=str(tmp_path)))
    assert str(caught.value).endswith(
        "It needs Python code that comes with it: set trust_remote_code: true if you trust its author."
    )


def test_load_when_weights_are_pickled_only_gives_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = ModelConfig(model_name_or_path=str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights only \(\.bin\)") as caught:
        load_model(config, dtype=torch.float32, device=torch.device("cpu"))
    program = str(caught.value).split('python -c "')[1].removesuffix('"')
    exec(program, {})
    assert list(tmp_path.glob("model-safetensors/*.safetensors"))


@pytest.mark.parametrize("what", ["the model", "the tokenizer"])
def test_explained_when_a_file_is_damaged_says_nothing_of_folders(tmp_path: Path, what: str) -> None:
    (tmp_path / "m.gguf").touch()
    message = rf"^model_name_or_path: {what} of .*m.gguf cannot be loaded \(bad magic\)"
    with pytest.raises(ModelError, match=message), explained(str(tmp_path / "m.gguf"), what):
        raise ValueError("bad magic")
