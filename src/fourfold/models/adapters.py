"""What is trained: everything, a few layers, or low-rank adapters through PEFT."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.base.units import format_count
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.source import explained
from fourfold.models.targets import lora_targets

log = get_logger(__name__)


def attach(
    model: PreTrainedModel,
    config: ModelConfig,
    tuning: TuningConfig,
    *,
    trainable: bool,
    master_dtype: torch.dtype | None = torch.float32,
) -> PreTrainedModel | PeftModel:
    """Set what is trained, and add or load the adapters.

    Args:
        model: as `load_model` gives it; changed in place.
        trainable: False for chat, prediction and export: adapters are loaded and nothing requires a gradient.
        master_dtype: of the trained parameters; None leaves them as they are (`pure_bf16`).
    Raises:
        ConfigError: a target that matches nothing, or adapters with another `finetuning_type`.
        ModelError: an adapter that cannot be loaded or belongs to another base model.
    """
    model.requires_grad_(False)
    if tuning.finetuning_type != "lora" and config.adapter_name_or_path:
        raise ConfigError(
            f"adapter_name_or_path: adapters need finetuning_type: lora, which is {tuning.finetuning_type}. "
            "Change one of the two."
        )
    tuned: PreTrainedModel | PeftModel = model
    if tuning.finetuning_type == "lora":
        tuned = _attach_lora(model, config, tuning, trainable)
    elif trainable:
        log.info("Fine-tuning method: %s", tuning.finetuning_type.capitalize())
        model.requires_grad_(True)
    if not trainable:
        tuned.requires_grad_(False)
        return tuned.eval()
    if master_dtype is not None:
        upcast_trainable(tuned, master_dtype)
    return tuned


def _attach_lora(
    model: PreTrainedModel, config: ModelConfig, tuning: TuningConfig, trainable: bool
) -> PreTrainedModel | PeftModel:
    *merged, last = config.adapter_name_or_path or (None,)
    for name in merged:
        with explained(str(name), "the adapter", key="adapter_name_or_path"):
            model = PeftModel.from_pretrained(model, name).merge_and_unload()
    if last is not None:
        with explained(last, "the adapter", key="adapter_name_or_path"):
            return PeftModel.from_pretrained(model, last, is_trainable=trainable, autocast_adapter_dtype=False)
    if not trainable:
        return model
    return _new_adapter(model, tuning)


def _new_adapter(model: PreTrainedModel, tuning: TuningConfig) -> PeftModel:
    log.info("Fine-tuning method: LoRA")
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha or 2 * tuning.lora_rank,
        lora_dropout=tuning.lora_dropout,
        target_modules=lora_targets(model, tuning.lora_target),
        use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora,
        modules_to_save=list(tuning.additional_target) or None,
    )
    peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def upcast_trainable(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter that is trained to `dtype`, in place."""
    changed = [p for p in model.parameters() if p.requires_grad and p.dtype != dtype]
    for parameter in changed:
        parameter.data = parameter.data.to(dtype)
    if changed:
        log.info("Upcasting trainable params to %s.", str(dtype).removeprefix("torch."))


def describe_parameters(model: torch.nn.Module) -> str:
    """How many parameters are trained, in the words that PEFT and others use.

    Packed 4-bit weights count as the parameters they stand for.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = num_elements(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    share = 100 * trainable / max(total, 1)
    return (
        f"trainable params: {format_count(trainable)} || all params: {format_count(total)} || trainable%: {share:.4f}"
    )


def num_elements(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter; two for each byte of a packed 4-bit weight."""
    packed = type(parameter).__name__ == "Params4bit" and not parameter.dtype.is_floating_point
    return parameter.numel() * (2 if packed else 1)
