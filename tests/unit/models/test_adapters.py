from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fourfold.base.errors import ConfigError, ModelError
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach, identify_base, plan_adapters
from fourfold.models.patches import peft_noise_ignored
from fourfold.models.weights import save_model
from tiny_models import Load, Logits, save_tiny_model


def _move(model: nn.Module, seed: int) -> None:
    """Give all trained parameters values far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def _trained_adapter(
    load: Load, folder: Path, *, seed: int = 1, tuning: TuningConfig | None = None, **keys: object
) -> Path:
    model, config = load(**keys)
    tuning = tuning or TuningConfig()
    tuned = attach(model, config, tuning, trainable=True)
    _move(tuned, seed)
    save_model(tuned, folder, base=identify_base(config, tuning))
    return folder


def test_attach_lora_on_all_targets_every_linear_layer_but_the_head(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = load()
    with caplog.at_level(logging.INFO):
        tuned = attach(model, config, TuningConfig(lora_rank=4), trainable=True)
    assert "Found linear modules: q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj" in caplog.text
    assert isinstance(tuned, PeftModel)
    lora = tuned.peft_config["default"]
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.lora_alpha) == (4, 8)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in name for name in trained)


def test_attach_with_bf16_base_keeps_adapters_in_the_master_dtype(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    config = ModelConfig(model_name_or_path=str(llama_folder))
    tuned = attach(model, config, TuningConfig(), trainable=True, master_dtype=torch.float32)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in tuned.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_attach_with_pure_bf16_keeps_everything_in_bf16(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    config = ModelConfig(model_name_or_path=str(llama_folder))
    tuned = attach(model, config, TuningConfig(), trainable=True, master_dtype=None)
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.bfloat16}


def test_attach_with_a_target_that_matches_nothing_lists_the_kinds(load: Load) -> None:
    model, config = load()
    with pytest.raises(ConfigError, match=r"lora_target: q_porj matches nothing .* Did you mean .*q_proj.*up_proj"):
        attach(model, config, TuningConfig(lora_target=("q_porj",)), trainable=True)


def test_attach_with_an_additional_target_that_matches_nothing_lists_modules(load: Load) -> None:
    model, config = load()
    with pytest.raises(ConfigError, match=r"additional_target: embeddings matches nothing .*embed_tokens"):
        attach(model, config, TuningConfig(additional_target=("embeddings",)), trainable=True)


@pytest.mark.parametrize("tied", [False, True])
def test_additional_target_is_trained_saved_and_reloaded(
    tmp_path: Path, load: Load, logits: Logits, tied: bool
) -> None:
    folder = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=tied)
    tuning = TuningConfig(additional_target=("embed_tokens", "norm"))
    model, config = load(folder)
    tuned = attach(model, config, tuning, trainable=True)
    assert any("embed_tokens" in name for name, parameter in tuned.named_parameters() if parameter.requires_grad)
    _move(tuned, 0)
    expected = logits(tuned.eval())
    save_model(tuned, tmp_path / "adapter")
    again, config = load(folder, adapter_name_or_path=(str(tmp_path / "adapter"),))
    reloaded = attach(again, config, tuning, trainable=False)
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=0)
    assert isinstance(reloaded, PeftModel)
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [{"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 3, "lora_dropout": 0.1}])
def test_lora_variants_saved_by_us_load_in_peft_alone(
    tmp_path: Path, load: Load, logits: Logits, llama_folder: Path, keys: dict[str, object]
) -> None:
    model, config = load()
    tuned = attach(model, config, TuningConfig(**keys), trainable=True)
    _move(tuned, 0)
    save_model(tuned, tmp_path)
    with peft_noise_ignored():
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), str(tmp_path))
    torch.testing.assert_close(logits(alone.eval()), logits(tuned.eval()), rtol=0, atol=0)


def test_adapters_are_merged_in_order_and_the_last_one_is_continued(tmp_path: Path, load: Load, logits: Logits) -> None:
    first = _trained_adapter(load, tmp_path / "1", seed=1)
    second = _trained_adapter(
        load, tmp_path / "2", seed=2, adapter_name_or_path=(str(first),), tuning=TuningConfig(create_new_adapter=True)
    )
    assert json.loads((second / "fourfold.json").read_text())["base"]["merged"] == [str(first)]
    model, config = load(adapter_name_or_path=(str(first), str(second)))
    tuned = attach(model, config, TuningConfig(), trainable=True)
    assert isinstance(tuned, PeftModel)
    assert any(parameter.requires_grad for parameter in tuned.parameters())
    with peft_noise_ignored():
        by_hand = PeftModel.from_pretrained(load()[0], str(first)).merge_and_unload()
        by_hand = PeftModel.from_pretrained(by_hand, str(second))
    torch.testing.assert_close(logits(tuned.eval()), logits(by_hand.eval()), rtol=0, atol=0)


def test_an_adapter_made_by_peft_alone_is_loaded(tmp_path: Path, load: Load, logits: Logits) -> None:
    with peft_noise_ignored():
        made = get_peft_model(load()[0], LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        made.save_pretrained(str(tmp_path))
    model, config = load(adapter_name_or_path=(str(tmp_path),))
    torch.testing.assert_close(
        logits(attach(model, config, TuningConfig(), trainable=False)), logits(made.eval()), rtol=0, atol=0
    )


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, load: Load) -> None:
    other = save_tiny_model(tmp_path / "other", "llama", seed=7)
    adapter = _trained_adapter(load, tmp_path / "adapter")
    model, config = load(other, adapter_name_or_path=(str(adapter),))
    with pytest.raises(ModelError, match=r"was trained on .* whose weights are not those of"):
        attach(model, config, TuningConfig(), trainable=False)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, load: Load) -> None:
    adapter = _trained_adapter(load, tmp_path / "adapter")
    (adapter / "fourfold.json").unlink()
    other = save_tiny_model(tmp_path / "other", "llama", hidden_size=64)
    model, config = load(other, adapter_name_or_path=(str(adapter),))
    with pytest.raises(ModelError, match="have other shapes"):
        attach(model, config, TuningConfig(), trainable=False)


def test_an_adapter_that_does_not_exist_is_named(load: Load) -> None:
    model, config = load(adapter_name_or_path=("./no/such/adapter",))
    with pytest.raises(ModelError, match=r"adapter_name_or_path: there is no folder \./no/such/adapter"):
        attach(model, config, TuningConfig(), trainable=False)


def test_an_adapter_used_on_a_different_stack_is_warned_about(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    first = _trained_adapter(load, tmp_path / "1")
    second = _trained_adapter(
        load, tmp_path / "2", adapter_name_or_path=(str(first),), tuning=TuningConfig(create_new_adapter=True)
    )
    model, config = load(adapter_name_or_path=(str(second),))
    with caplog.at_level(logging.WARNING):
        attach(model, config, TuningConfig(), trainable=False)
    assert "was trained on top of" in caplog.text


def test_settings_that_a_continued_adapter_does_not_have_are_warned_about(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _trained_adapter(load, tmp_path)
    model, config = load(adapter_name_or_path=(str(folder),))
    with caplog.at_level(logging.WARNING):
        attach(model, config, TuningConfig(lora_rank=16, lora_dropout=0.0), trainable=True)
    assert [line for line in caplog.messages if "has no effect" in line] == [
        f"lora_rank: 16 has no effect, since adapter {folder} is trained further, which has 8. Remove it, or begin a "
        "new adapter on top with create_new_adapter: true."
    ]


def test_plan_adapters_with_full_tuning_refuses_adapters() -> None:
    config = ModelConfig(model_name_or_path="m", adapter_name_or_path=("a",))
    with pytest.raises(ConfigError, match="adapters need finetuning_type: lora"):
        plan_adapters(config, TuningConfig(finetuning_type="full"), trainable=True)


def test_upcast_layernorm_holds_norms_in_fp32(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    config = ModelConfig(model_name_or_path=str(llama_folder), upcast_layernorm=True)
    attach(model, config, TuningConfig(), trainable=True, master_dtype=None)
    dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["input_layernorm"] == dtypes["norm"] == torch.float32
    assert dtypes["embed_tokens"] == torch.bfloat16
