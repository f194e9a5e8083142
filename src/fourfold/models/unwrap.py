"""The Transformers model under whatever wraps it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fourfold.base.peft import PeftModel

TunedModel = PreTrainedModel | PeftModel
"""A model as it is trained and saved."""


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside an adapter wrapper, or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner
