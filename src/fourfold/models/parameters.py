"""Counting, casting and listing a model's parameters."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.base.log import get_logger
from fourfold.base.units import format_count

log = get_logger(__name__)

_NORM_PARTS = ("norm", "ln_", "ln1", "ln2")


def upcast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter that is trained to `dtype`, in place."""
    changed = [p for p in model.parameters() if p.requires_grad and p.dtype != dtype]
    for parameter in changed:
        parameter.data = parameter.data.to(dtype)
    if changed:
        log.info("Upcasting trainable params to %s.", str(dtype).removeprefix("torch."))


def upcast_norms(model: nn.Module) -> None:
    """Cast the weights of norm layers to fp32, in place."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and any(part in name for part in _NORM_PARTS):
            parameter.data = parameter.data.to(torch.float32)
    log.info("upcast_layernorm: the norm layers' weights are held in fp32.")


def is_empty(model: nn.Module) -> bool:
    """Whether some weights are still to be read."""
    return any(parameter.is_meta for parameter in model.parameters())


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of tied parameters -> the one name that they are saved under.

    Stages of a pipeline have a copy each, under another name; so both are known by one.
    """
    return dict(model.all_tied_weights_keys) if isinstance(model, PreTrainedModel) else {}


def describe_parameters(model: nn.Module) -> str:
    """How many parameters are trained, in the words that PEFT and others use.

    Packed 4-bit weights count as the parameters they stand for.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = num_elements(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    share = 100 * trainable / max(total, 1)
    counts = f"trainable params: {format_count(trainable)} || all params: {format_count(total)}"
    return f"{counts} || trainable%: {share:.4f}"


def num_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter; of a weight that bitsandbytes has packed to 4 bits, those it stands for."""
    # By name, since bitsandbytes is optional: its Params4bit holds two elements in each byte of storage.
    packed = type(parameter).__name__ == "Params4bit" and parameter.shape[-1] == 1
    return parameter.numel() * parameter.element_size() * 2 if packed else parameter.numel()


def list_parameters(model: nn.Module) -> str:
    """One line a parameter: name, dtype, device and whether it is trained."""
    return "\n".join(
        f"name: {name}, dtype: {parameter.dtype}, device: {parameter.device}, trainable: {parameter.requires_grad}"
        for name, parameter in model.named_parameters()
    )
