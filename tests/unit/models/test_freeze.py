from __future__ import annotations

import pytest

from fourfold.base.errors import ConfigError
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach
from tiny_models import Load, tiny_model


def _trained(load: Load, **keys: object) -> set[str]:
    model, config = load()
    attach(model, config, TuningConfig(finetuning_type="freeze", **keys), trainable=True)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freeze_trains_the_last_layers(load: Load) -> None:
    trained = _trained(load, freeze_trainable_layers=1)
    assert len(trained) == 9
    assert all(name.startswith("model.layers.1.") for name in trained)


def test_freeze_with_a_negative_number_trains_the_first_layers(load: Load) -> None:
    assert all(name.startswith("model.layers.0.") for name in _trained(load, freeze_trainable_layers=-1))


def test_freeze_with_modules_trains_only_those(load: Load) -> None:
    trained = _trained(load, freeze_trainable_layers=2, freeze_trainable_modules="mlp,q_proj")
    assert {name.split(".", 3)[3] for name in trained} == {
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "self_attn.q_proj.weight",
    }


def test_freeze_with_extra_modules_trains_them_too(load: Load) -> None:
    trained = _trained(load, freeze_trainable_layers=0, freeze_extra_modules="embed_tokens,norm")
    assert trained == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"freeze_trainable_layers": 3}, r"freeze_trainable_layers: 3 exceeds the model's 2 layers"),
        ({"freeze_trainable_layers": 0}, r"freeze_trainable_layers: 0 leaves nothing to train"),
        ({"freeze_trainable_modules": "mpl"}, r"freeze_trainable_modules: mpl matches nothing .* Did you mean mlp"),
        ({"freeze_extra_modules": "embed"}, r"freeze_extra_modules: embed matches nothing .* embed_tokens"),
    ],
)
def test_freeze_with_what_does_not_exist_is_refused(load: Load, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _trained(load, **keys)


@pytest.mark.parametrize("tuning", ["full", "freeze", "lora"])
def test_bias_by_which_experts_are_chosen_is_not_trained(tuning: str) -> None:
    """A parameter in this family, without a gradient: what waits for one on every rank would wait for ever."""
    model = tiny_model("ernie4_5_moe", tie_word_embeddings=False)
    more = {"additional_target": "gate"} if tuning == "lora" else {"freeze_trainable_layers": 1}
    attach(model, ModelConfig(), TuningConfig(finetuning_type=tuning, **more), trainable=True)
    trained = {name: parameter.requires_grad for name, parameter in model.model.layers[1].named_parameters()}
    biases = [name for name in trained if name.endswith("e_score_correction_bias")]
    assert biases
    assert not any(trained.pop(name) for name in biases)
    assert any(trained.values()) if tuning == "lora" else all(trained.values())
