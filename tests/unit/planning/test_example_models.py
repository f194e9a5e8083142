"""The shipped model shapes have as many parameters as their makers publish."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fourfold.base.units import GIB

_FOLDER = Path(__file__).parents[3] / "examples" / "models"

# model cards and safetensors indexes; tied embeddings count once
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3.5-9B": 8_953_803_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Mixtral-8x7B": 46_702_792_704,
    # of the main model, with 256 selection biases in each of 58 layers, which Transformers keeps as buffers
    "DeepSeek-V3": 671_026_419_200 - 58 * 256,
    "gpt-oss-20b": 20_914_757_184,
}


@cache
def _model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(_FOLDER / name))


def test_models_when_listed_are_all_known_here() -> None:
    folders = {path.parent.name for path in _FOLDER.glob("*/config.json")}
    assert folders == {*PUBLISHED, "one-huge-matrix"}
    readme = (_FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"{name}" in readme for name in folders)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameters_when_built_are_as_many_as_published(name: str, published: int) -> None:
    assert sum(parameter.numel() for parameter in _model(name).parameters()) == published


def test_biases_when_deepseek_is_built_are_the_buffers_left_out() -> None:
    biases = [b for name, b in _model("DeepSeek-V3").named_buffers() if name.endswith("e_score_correction_bias")]
    assert sum(bias.numel() for bias in biases) == 58 * 256


@pytest.mark.parametrize("name", [*PUBLISHED, "one-huge-matrix"])
def test_config_when_read_is_plain_bf16_with_its_rotary_table(name: str) -> None:
    values = json.loads((_FOLDER / name / "config.json").read_text(encoding="utf-8"))
    assert values["dtype"] == "bfloat16"
    assert "quantization_config" not in values
    assert values["rope_parameters"]["rope_theta"] >= 10_000
    config = AutoConfig.from_pretrained(_FOLDER / name)
    # every key reaches the config under its own name or the one that Transformers maps it to
    assert all(getattr(config, key) == value for key, value in values.items() if key not in ("dtype", "architectures"))
    assert type(_model(name)).__name__ == values["architectures"][0]


def test_one_huge_matrix_when_in_bf16_exceeds_a_card_of_80_gb() -> None:
    sizes = {name: parameter.numel() for name, parameter in _model("one-huge-matrix").named_parameters()}
    # hidden 65,536 = 2^16 times intermediate 655,360 = 10 x 2^16, two bytes each
    assert max(sizes.values()) * 2 == 10 * 2**33 == 80 * GIB
    assert [name for name, size in sizes.items() if size == max(sizes.values())] == [
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("gate", "up", "down")
    ]
