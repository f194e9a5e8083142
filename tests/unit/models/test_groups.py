from __future__ import annotations

from torch import nn
from transformers import Trainer

from fourfold.config.training import TrainingConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach
from fourfold.models.groups import parameter_groups
from tiny_models import Load, tiny_model

TRAINING = TrainingConfig(learning_rate=1e-3, weight_decay=0.1)


def _names(model: nn.Module, groups: list[dict[str, object]]) -> dict[object, set[str]]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {by_id[id(p)] for p in group["params"]} for group in groups}  # type: ignore[attr-defined]


def test_parameter_groups_decay_what_transformers_decays() -> None:
    for family in ("llama", "qwen2", "gpt_oss", "starcoder2", "cohere2"):
        model = tiny_model(family)
        groups = parameter_groups(model, TRAINING, TuningConfig(finetuning_type="full"))
        expected = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        expected &= {name for name, _ in model.named_parameters()}  # it lists a tied head too
        assert _names(model, groups)["decay"] == expected
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert {group["lr"] for group in groups} == {1e-3}


def test_parameter_groups_with_loraplus_give_b_the_higher_rate(load: Load) -> None:
    model, config = load()
    tuning = TuningConfig(loraplus_lr_ratio=16.0, additional_target=("norm",))
    tuned = attach(model, config, tuning, trainable=True)
    groups = {group["name"]: group for group in parameter_groups(tuned, TRAINING, tuning)}
    names = _names(tuned, list(groups.values()))
    assert set(groups) == {"decay", "lora_b_decay", "lora_b_no_decay"}
    assert all(".lora_A." in name for name in names["decay"])
    assert all(".lora_B." in name for name in names["lora_b_decay"])
    assert all("norm" in name for name in names["lora_b_no_decay"])
    assert groups["decay"]["lr"] == 1e-3
    assert groups["lora_b_decay"]["lr"] == 16e-3
    assert groups["lora_b_no_decay"]["weight_decay"] == 0.0


def test_parameter_groups_leave_frozen_parameters_out(load: Load) -> None:
    model, config = load()
    tuned = attach(model, config, TuningConfig(), trainable=True)
    grouped = [p for group in parameter_groups(tuned, TRAINING, TuningConfig()) for p in group["params"]]
    assert len(grouped) == sum(p.requires_grad for p in tuned.parameters())
