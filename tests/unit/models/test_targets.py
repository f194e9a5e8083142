"""Which layers `lora_target: all` means."""

from __future__ import annotations

import pytest

from fourfold.base.errors import ConfigError
from fourfold.models.targets import lora_targets
from tiny_models import tiny_model


def test_lora_targets_when_all_are_wanted_leave_out_what_has_no_gradient() -> None:
    """What chooses the positions of sparse attention."""
    assert {"wk", "wq_b", "weights_proj"}.isdisjoint(lora_targets(tiny_model("glm_moe_dsa"), ["all"]).modules)


def test_lora_targets_when_there_is_no_linear_layer_says_so() -> None:
    with pytest.raises(ConfigError, match="lora_target: all finds no linear layer in a gpt2 model"):
        lora_targets(tiny_model("gpt2"), ["all"])


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),  # of a class of its own
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_lora_targets_when_all_are_wanted_are_linear_layers(family: str, kinds: set[str]) -> None:
    assert set(lora_targets(tiny_model(family), ["all"]).modules) == kinds
