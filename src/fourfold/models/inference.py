"""The model for inference, loaded from a run's config: for chat, the API, prediction and export."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base.errors import ConfigError
from fourfold.base.peft import PeftModel
from fourfold.config.model import ModelConfig
from fourfold.config.schema import Run
from fourfold.models.adapters import attach
from fourfold.models.load import load_config, load_model

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_for_inference(
    run: Run, tokenizer: PreTrainedTokenizerBase | None, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel | PeftModel:
    """The model in evaluation mode, with its adapters attached but the last one not merged.

    Args:
        dtype: of the weights that are not quantised; default: as `infer_dtype` says.
    Raises:
        ConfigError: keys that contradict each other or this machine.
        ModelError: a model that cannot be loaded, or an adapter of another base model.
    """
    model = load_model(run.model, dtype=dtype or inference_dtype(run.model, device), device=device, tokenizer=tokenizer)
    return attach(model, run.model, run.tuning, trainable=False)


def inference_device(run: Run) -> torch.device:
    """The first GPU, or the CPU where there is none or `use_cpu` says so."""
    return torch.device("cuda", 0) if torch.cuda.is_available() and not run.training.use_cpu else torch.device("cpu")


def inference_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`infer_dtype` as torch knows it.

    `auto` is the checkpoint's own; a CPU takes float32 for float16, in which it computes slowly and overflows.

    Raises:
        ConfigError: float16 is asked for on a CPU.
        ModelError: the model's config cannot be loaded.
    """
    if config.infer_dtype == "float16" and device.type == "cpu":
        raise ConfigError("infer_dtype: float16 does not work well on a CPU. Use bfloat16, float32 or auto.")
    chosen = written_dtype(config)
    return torch.float32 if chosen is torch.float16 and device.type == "cpu" else chosen


def written_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of an exported model: `infer_dtype`, or what the checkpoint's own weights have; bf16 if quantised.

    Raises:
        ModelError: the model's config cannot be loaded.
    """
    if config.infer_dtype != "auto":
        return _DTYPES[config.infer_dtype]
    model_config = load_config(config)
    if config.quantization_bit is not None or model_config.to_dict().get("quantization_config") is not None:
        return torch.bfloat16
    own = model_config.dtype
    return own if isinstance(own, torch.dtype) and own.is_floating_point else torch.float32
