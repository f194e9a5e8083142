"""Keys without effect beside others are told, one line each."""

from __future__ import annotations

from typing import Any

import pytest

from fourfold.config.load import load
from fourfold.config.rules import Verb

_KEYS: dict[str, Any] = {"model_name_or_path": "m", "output_dir": "o", "dataset": "d"}


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"use_fast_tokenizer": False}, "use_fast_tokenizer: false changes nothing; Transformers 5 has one tokenizer"),
        ({"infer_backend": "vllm"}, "infer_backend: 'vllm' changes nothing in training"),
        ({"ref_model_adapters": "a"}, "ref_model_adapters: changes nothing without ref_model"),
        ({"ref_model_quantization_bit": 4}, "ref_model_quantization_bit: changes nothing without ref_model"),
        ({"stage": "dpo", "pref_loss": "orpo", "ref_model": "r"}, "ref_model: changes nothing; pref_loss: orpo has no"),
        ({"stage": "dpo", "pref_loss": "simpo", "ref_model": "r"}, "ref_model: changes nothing; pref_loss: simpo has"),
    ],
)
def test_load_when_a_key_has_no_effect_notes_it(keys: dict[str, Any], note: str) -> None:
    (found,) = load({**_KEYS, **keys}, verb="train").notes
    assert found.startswith(note)


@pytest.mark.parametrize(
    ("keys", "verb"),
    [
        ({"infer_backend": "vllm"}, "data"),
        ({"stage": "dpo", "ref_model": "r", "ref_model_adapters": "a"}, "train"),
        ({"stage": "dpo", "pref_loss": "orpo"}, "train"),
    ],
)
def test_load_when_keys_have_an_effect_notes_nothing(keys: dict[str, Any], verb: Verb) -> None:
    assert load({**_KEYS, **keys}, verb=verb).notes == ()
