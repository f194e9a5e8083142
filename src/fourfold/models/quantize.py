"""Quantised base models: bitsandbytes 4 and 8 bit, made at load time or read from the checkpoint."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from fourfold.base.errors import ConfigError, ModelError
from fourfold.base.extras import install_extra
from fourfold.base.log import get_logger
from fourfold.base.units import format_bytes
from fourfold.config.model import ModelConfig
from fourfold.models.targets import stacked_weights

log = get_logger(__name__)


def settle_own_quantization(model_config: PreTrainedConfig, config: ModelConfig, dtype: torch.dtype) -> bool:
    """Adapt, in place, how a checkpoint that is quantised already is loaded: its weights then compute in `dtype`.

    Returns:
        whether the checkpoint is quantised.
    Raises:
        ConfigError: the run asks for bits that the checkpoint contradicts.
        ModelError: bitsandbytes is not installed, or the checkpoint's own quantisation cannot be trained.
    """
    own = model_config.to_dict().get("quantization_config")
    if own is None:
        return False
    model_config.quantization_config = _from_checkpoint(own, config, dtype)
    return True


def new_quantization(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How plain weights are quantised while they are loaded; None if they stay plain.

    Args:
        dtype: that quantised weights are expanded to when they are used.
    Raises:
        ModelError: bitsandbytes is not installed.
    """
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


def _from_checkpoint(own: dict[str, Any], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    method = str(own.get("quant_method", ""))
    name = str(dtype).removeprefix("torch.")
    if method == "bitsandbytes":
        _require_bitsandbytes("model_name_or_path")
        bits = 4 if own.get("load_in_4bit") or own.get("_load_in_4bit") else 8
        if config.quantization_bit not in (None, bits):
            raise ConfigError(
                f"quantization_bit: {config.quantization_bit} contradicts the checkpoint, which is quantised to {bits} "
                "bits. Leave quantization_bit out."
            )
        log.info("The checkpoint is quantised to %d bits by bitsandbytes.", bits)
        return {**own, "bnb_4bit_compute_dtype": name}
    if method in ("mxfp4", "fp8"):
        if config.quantization_bit is not None:
            raise ConfigError(
                f"quantization_bit: {config.quantization_bit} contradicts the checkpoint's own {method}. "
                "Leave quantization_bit out; the weights are expanded."
            )
        log.info("The checkpoint's %s weights are expanded to %s.", method, name)
        return {**own, "dequantize": True}
    raise ModelError(
        f"model_name_or_path: the checkpoint is quantised by {method or 'an unknown method'}, which cannot be trained. "
        "Use the model's plain checkpoint with quantization_bit: 4, or one quantised by bitsandbytes."
    )


def _require_bitsandbytes(key: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{key}: bitsandbytes is not installed. Run {install_extra('quant')}.")


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model holds weights packed by bitsandbytes."""
    own = model.config.to_dict().get("quantization_config") or {}
    return own.get("quant_method") == "bitsandbytes"


def settle_quantized(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes to repack 4-bit weights on CPUs with AVX512-BF16, and to log a line at each 8-bit product.

    It repacks at the first forward pass in evaluation mode, in place: the scales are rounded to bf16, double
    quantisation is lost, and the kernel for that layout has no backward pass. An evaluation before or during
    training would end the training without a word. Last seen in bitsandbytes 0.50.2.
    """
    if not is_quantized(model):
        return
    from bitsandbytes.nn.modules import Linear4bit

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    experts = [model.get_parameter(name) for name in stacked_weights(model)]
    if experts:
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in experts)
        log.warning(
            "quantization_bit: bitsandbytes quantises linear layers only; the expert weights stay in %s and take %s.",
            str(experts[0].dtype).removeprefix("torch."),
            format_bytes(num_bytes),
        )


def dequantize_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Expand weights packed by bitsandbytes to plain linear layers of `dtype`, in place; a plain model stays.

    An adapter can then be attached, merged and saved as with any model.
    """
    if not is_quantized(model):
        return model
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit | Linear8bitLt):
            continue
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
        plain.weight = nn.Parameter(_expand(module).to(dtype), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            tensor.data = tensor.data.to(dtype)
    # Transformers marks a quantised model in three places, each of which would forbid saving it as a plain one.
    del model.config.quantization_config  # type: ignore[attr-defined]
    model.is_quantized = False  # type: ignore[assignment]
    model.hf_quantizer = None  # type: ignore[assignment]
    return model


def _expand(module: nn.Linear) -> torch.Tensor:
    """The packed weight of a layer of bitsandbytes as floats [out, in]."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit

    weight = module.weight
    if isinstance(weight, Params4bit):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    assert isinstance(weight, Int8Params)
    assert isinstance(module, Linear8bitLt)
    # the first forward pass moves the scales from the weight into the layer's state
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    assert scales is not None
    return functional.int8_vectorwise_dequant(weight.data, scales)
