from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach
from fourfold.models.tokenizer import load_tokenizer
from fourfold.models.weights import save_model
from tiny_models import Load


def test_save_model_writes_a_folder_that_others_load(tmp_path: Path, llama_folder: Path, load: Load) -> None:
    model, config = load()
    save_model(model, tmp_path, tokenizer=load_tokenizer(config))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["use_cache"] is True
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert model.config.use_cache is False
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path))).chat_template
    for name, tensor in load_file(llama_folder / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "model.safetensors")[name])


def test_save_model_with_a_dtype_writes_it(tmp_path: Path, load: Load) -> None:
    model, _ = load()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32


def test_save_model_when_the_folder_has_a_readme_leaves_it(tmp_path: Path, load: Load) -> None:
    model, config = load()
    tuned = attach(model, config, TuningConfig(), trainable=True)
    (tmp_path / "README.md").write_text("Mine.", encoding="utf-8")
    save_model(tuned, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "Mine."
    save_model(tuned, tmp_path / "other")
    assert "library_name: peft" in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
