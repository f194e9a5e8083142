"""A second model beside the one that is trained: what is said of it when it cannot be used."""

from __future__ import annotations

import pytest

from fourfold.base.errors import ModelError
from fourfold.config.load import load
from fourfold.config.second import REFERENCE_KEYS, reward_keys
from fourfold.training.frozen import named_as


def test_named_as_when_loading_fails_names_the_second_models_keys() -> None:
    message = r"^ref_model: there is no folder x, so give ref_model_adapters\.$"
    with pytest.raises(ModelError, match=message), named_as(REFERENCE_KEYS):
        raise ModelError("model_name_or_path: there is no folder x, so give adapter_name_or_path.")
    with pytest.raises(ModelError, match=r"^ref_model: it is not of use\.$"), named_as(REFERENCE_KEYS):
        raise ModelError("it is not of use.")
    adapter = load({"reward_model": "x"})
    with pytest.raises(ModelError, match=r"^reward_model: x cannot be loaded\.$"), named_as(reward_keys(adapter)):
        raise ModelError("adapter_name_or_path: x cannot be loaded.")
