from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from fourfold.base.errors import ConfigError, ModelError
from fourfold.config.model import ModelConfig
from fourfold.models.load import load_config, load_model
from tiny_models import Load, Logits, save_tiny_model

CPU = torch.device("cpu")


def test_load_model_from_a_folder_is_in_evaluation_mode_without_cache(load: Load) -> None:
    model, _ = load()
    assert not model.training
    assert model.config.use_cache is False
    assert model.dtype == torch.float32


def test_load_model_from_scratch_ignores_the_weights(load: Load, logits: Logits) -> None:
    torch.manual_seed(3)
    fresh, _ = load(train_from_scratch=True)
    torch.manual_seed(3)
    again, _ = load(train_from_scratch=True)
    torch.testing.assert_close(logits(fresh), logits(again), rtol=0, atol=0)
    assert not torch.equal(logits(fresh), logits(load()[0]))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c"])
def test_load_model_when_the_path_is_wrong_names_it(name: str) -> None:
    with pytest.raises(ModelError, match=f"model_name_or_path: there is no folder {name}"):
        load_model(ModelConfig(model_name_or_path=name), dtype=torch.float32, device=CPU)


def test_load_model_without_a_name_says_so() -> None:
    with pytest.raises(ConfigError, match="model_name_or_path: no model is given"):
        load_model(ModelConfig(), dtype=torch.float32, device=CPU)


def test_load_model_when_the_folder_has_no_weights_says_so(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the model of .* cannot be loaded \(.*\)\. Check that the folder is"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path)), dtype=torch.float32, device=CPU)


def test_load_model_never_reads_pickled_weights(tmp_path: Path, load: Load) -> None:
    save_tiny_model(tmp_path)
    torch.save(load()[0].state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path)), dtype=torch.float32, device=CPU)


def test_load_model_when_a_hub_id_cannot_be_fetched_says_what_to_do() -> None:
    told = r"the config of nobody/no-such-model is not in the cache.*HF_HUB_OFFLINE is set.*a local path; .*HF_ENDPOINT"
    with pytest.raises(ModelError, match=told):
        load_config(ModelConfig(model_name_or_path="nobody/no-such-model"))


@pytest.mark.parametrize(
    ("kind", "seq_len", "expected"),
    [
        ("linear", None, {"rope_type": "linear", "factor": 2.0}),
        ("linear", 600, {"rope_type": "linear", "factor": 3.0}),  # 600 / 256 = 2.34, rounded up
        ("yarn", 512, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}),
        (
            "llama3",
            512,
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 256,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
    ],
)
def test_rope_scaling_stretches_to_the_sequence_length(
    llama_folder: Path, logits: Logits, kind: str, seq_len: int | None, expected: dict[str, object]
) -> None:
    config = ModelConfig(model_name_or_path=str(llama_folder), rope_scaling=kind)
    loaded = load_config(config, seq_len=seq_len)
    assert loaded.rope_parameters == {**expected, "rope_theta": 10000.0}
    assert loaded.max_position_embeddings == 256 * expected["factor"]  # type: ignore[operator]
    model = load_model(config, dtype=torch.float32, device=CPU, seq_len=seq_len)
    assert torch.isfinite(logits(model)).all()


def test_rope_scaling_when_the_sequence_fits_changes_nothing(
    llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_config(ModelConfig(model_name_or_path=str(llama_folder), rope_scaling="linear"), seq_len=256)
    assert loaded.rope_parameters["rope_type"] == "default"
    assert "within the model's own 256 positions" in caplog.text


def test_trust_remote_code_is_shown(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(trust_remote_code=True)
    assert "trust_remote_code: Python code that comes with" in caplog.text


@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
def test_flash_attn_when_it_is_not_installed_goes_on_with_pytorchs_own(
    kernel: str, load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(f"fourfold.models.load.{name}", lambda: False)
    with caplog.at_level(logging.WARNING):
        model, _ = load(flash_attn=kernel)
    assert model.config._attn_implementation == "sdpa"
    assert f"flash_attn: {kernel} is not installed here" in caplog.text


def test_flash_attn_disabled_uses_the_plain_implementation(load: Load) -> None:
    model, _ = load(flash_attn="disabled")
    assert model.config._attn_implementation == "eager"
