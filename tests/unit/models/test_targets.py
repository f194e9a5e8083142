"""Which layers `lora_target: all` means."""

from __future__ import annotations

import pytest

from fourfold.models.targets import lora_targets
from tiny_models import tiny_model


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
