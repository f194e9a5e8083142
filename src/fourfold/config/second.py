"""Runs with a second model beside the one that is trained: a reference, or the teacher of stage kd.

The second model is loaded and split by the code of the first, which reads a run of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fourfold.config.schema import Run

REFERENCE_KEYS = {
    "model_name_or_path": "ref_model",
    "adapter_name_or_path": "ref_model_adapters",
    "quantization_bit": "ref_model_quantization_bit",
}
"""Keys of the run that `reference_run` returns, and those that are meant."""


def reward_keys(run: Run) -> dict[str, str]:
    """Keys of the run that `reward_run` returns, and those that are meant."""
    if run.preference.reward_model_type == "lora":
        return {"adapter_name_or_path": "reward_model"}
    return {
        "model_name_or_path": "reward_model",
        "adapter_name_or_path": "reward_model_adapters",
        "quantization_bit": "reward_model_quantization_bit",
    }


def frozen_run(run: Run, model: str, adapters: Sequence[str], bits: int | None) -> Run:
    """The run as if another model were the one that it loads."""
    names = tuple(adapters)
    keys = {"model_name_or_path": model, "adapter_name_or_path": names, "quantization_bit": bits, "resize_vocab": False}
    tuning = run.tuning.model_copy(update={"finetuning_type": "lora" if names else "full"})
    return replace(run, model=run.model.model_copy(update=keys), tuning=tuning)


def reference_run(run: Run) -> Run:
    """The run as if its reference were the model that it loads: `ref_model`, or what the training starts from."""
    keys = run.preference
    if keys.ref_model is None:
        return frozen_run(run, run.model.model_name_or_path or "", (), run.model.quantization_bit)
    return frozen_run(run, keys.ref_model, keys.ref_model_adapters, keys.ref_model_quantization_bit)


def reward_run(run: Run) -> Run:
    """The run as if its reward model were the one that it loads: adapters on the same base, or a model of its own."""
    keys = run.preference
    name, bits = keys.reward_model or "", keys.reward_model_quantization_bit
    if keys.reward_model_type == "lora":
        return frozen_run(run, run.model.model_name_or_path or "", (name,), bits or run.model.quantization_bit)
    return frozen_run(run, name, keys.reward_model_adapters, bits)


_OF_STUDENT: dict[str, Any] = {
    "adapter_folder": None,
    "model_revision": "main",
    "train_from_scratch": False,
    "rope_scaling": None,
    "moe_aux_loss_coef": None,
    "enable_liger_kernel": False,
    "upcast_layernorm": False,
    "print_param_status": False,
    "add_tokens": (),
    "add_special_tokens": (),
    "new_special_tokens_config": None,
}
"""Keys of the model that do not hold for its teacher."""


def teacher_run(run: Run) -> Run | None:
    """The run as if its teacher were the model that it loads; None for a run without one."""
    keys = run.preference
    if not keys.teacher_model:
        return None
    found = frozen_run(run, keys.teacher_model, keys.teacher_model_adapters, keys.teacher_model_quantization_bit)
    tuning = found.tuning.model_copy(
        update={"create_new_adapter": False, "pissa_init": False, "use_dora": False, "additional_target": ()}
    )
    parallel = run.parallel.model_copy(update={"offload_activations": False, "pp_layers_per_stage": None})
    training = run.training.model_copy(update={"neftune_noise_alpha": None})
    model = found.model.model_copy(update=_OF_STUDENT)
    return replace(found, model=model, tuning=tuning, parallel=parallel, training=training)


def distillation_problems(run: Run) -> Iterator[str]:
    """Keys of the teacher that contradict others."""
    keys, stage = run.preference, run.training.stage
    bits = keys.teacher_model_quantization_bit
    given = {
        "teacher_model": keys.teacher_model,
        "teacher_model_adapters": ",".join(keys.teacher_model_adapters),
        "teacher_model_quantization_bit": bits,
    }
    for name, value in given.items():
        if value and stage != "kd":
            yield f"{name}: {value} is for stage kd only, but stage is {stage}. Remove {name}, or use stage kd."
    if bits and len(keys.teacher_model_adapters) > 1:
        yield (
            f"teacher_model_quantization_bit: {bits} takes one adapter, but teacher_model_adapters has several. Merge "
            "them first, by `fourfold export`."
        )
    default = type(keys).model_fields["kd_beta"].default
    if keys.kd_beta != default and keys.kd_loss != "jsd":
        yield (
            f"kd_beta: {keys.kd_beta:g} is of kd_loss: jsd only, but kd_loss is {keys.kd_loss}. Remove kd_beta, or use "
            "kd_loss: jsd."
        )


def needs_teacher(run: Run) -> Iterator[str]:
    """A distillation without anyone to learn from."""
    if run.training.stage == "kd" and not run.preference.teacher_model:
        yield (
            "teacher_model: is not given, but stage is kd. Give a hub id, a folder or a .gguf file of the model to "
            "learn from."
        )
