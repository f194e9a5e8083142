"""PEFT's names; every module takes them from here, so that they come without what a run may never need.

PEFT imports bitsandbytes whenever it is installed, also for a base that is not quantised, and bitsandbytes passes its
fallbacks in plain PyTorch to `torch.compile` as it is imported. That alone imports the whole of `torch._inductor`,
0.7 s of every start. So bitsandbytes is imported first, with the compiler turned off for that time: the fallbacks,
which neither a GPU nor the kernels of bitsandbytes for CPUs need, stay as they are written.
"""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import fourfold.base.light_imports  # noqa: F401 - before PEFT imports Transformers

if importlib.util.find_spec("bitsandbytes") is not None:
    # read by `torch.compile` at each call; ends when bitsandbytes 0.50 compiles a fallback at its first use
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
        import bitsandbytes  # noqa: F401

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = [
    "BaseTunerLayer",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "ParamWrapper",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
