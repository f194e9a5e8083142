"""Quantised base models: bitsandbytes 4 and 8 bit, made at load time or read from the checkpoint."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedConfig
from transformers.utils.quantization_config import Mxfp4Config

from fourfold.base.errors import ConfigError, ModelError
from fourfold.base.log import get_logger
from fourfold.config.model import ModelConfig

log = get_logger(__name__)

QuantizationConfig = BitsAndBytesConfig | Mxfp4Config | FineGrainedFP8Config


def quantization_for(
    model_config: PreTrainedConfig, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> QuantizationConfig | None:
    """How the weights are to be loaded; None for plain ones.

    A checkpoint that is quantised already decides for itself; only the dtype it computes in is the run's.

    Args:
        dtype: that quantised weights are expanded to when they are used.
    Raises:
        ConfigError: the run asks for bits that the checkpoint contradicts.
        ModelError: bitsandbytes is not installed, or the checkpoint's own quantisation cannot be trained.
    """
    own = model_config.to_dict().get("quantization_config")
    if own is not None:
        return _from_checkpoint(own, config, dtype)
    if config.quantization_bit is None:
        return None
    _require_bitsandbytes("quantization_bit")
    log.info("Quantising the base model to %d bits with bitsandbytes.", config.quantization_bit)
    if config.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _from_checkpoint(own: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> QuantizationConfig:
    method = str(own.get("quant_method", ""))
    if method == "bitsandbytes":
        _require_bitsandbytes("model_name_or_path")
        bits = 4 if own.get("load_in_4bit") or own.get("_load_in_4bit") else 8
        if config.quantization_bit not in (None, bits):
            raise ConfigError(
                f"quantization_bit: {config.quantization_bit} contradicts the checkpoint, which is quantised to {bits} "
                "bits. Leave quantization_bit out."
            )
        quantization = BitsAndBytesConfig.from_dict({**own, "bnb_4bit_compute_dtype": dtype})
        assert isinstance(quantization, BitsAndBytesConfig)
        log.info("The checkpoint is quantised to %d bits by bitsandbytes.", bits)
        return quantization
    if method == "mxfp4":
        log.info("The checkpoint's mxfp4 weights are expanded to %s.", dtype)
        return Mxfp4Config(dequantize=True)
    if method == "fp8":
        log.info("The checkpoint's fp8 weights are expanded to %s.", dtype)
        return FineGrainedFP8Config(dequantize=True)
    raise ModelError(
        f"model_name_or_path: the checkpoint is quantised by {method or 'an unknown method'}, which cannot be trained. "
        "Use the model's plain checkpoint with quantization_bit: 4, or one quantised by bitsandbytes."
    )


def _require_bitsandbytes(key: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{key}: bitsandbytes is not installed. Run `pip install fourfold[quant]`.")
