"""DeepSpeed's config file, mapped onto the strategy, the offload and the keys of the optimizer.

A value `auto` says that the trainer's own key decides, so it is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fourfold.config.compat.files import read_mapping
from fourfold.config.compat.translation import translated
from fourfold.config.key import NoCounterpart, Section, Translation

_STRATEGY = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}

_SIMPLE = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
_OPTIMIZERS = {"Adam": "adamw_torch", "AdamW": "adamw_torch", "FusedAdam": "adamw_torch", "Muon": "muon"}
_OPTIMIZER_PARAMS = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_SCHEDULE_PARAMS = {"warmup_max_lr": "learning_rate", "warmup_num_steps": "warmup_steps"}

_READ = {"zero_optimization", "bf16", "fp16", "tensor_parallel", "optimizer", "scheduler", "activation_checkpointing"}
_ZERO_READ = {"stage", "offload_optimizer", "offload_param", "cpu_offload"}


def _given(mapping: Mapping[str, Any], name: str) -> Any:
    """The value of a key, None where it is missing, `auto` or null."""
    value = mapping.get(name)
    return None if value == "auto" else value


def _inner(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = mapping.get(name)
    return value if isinstance(value, Mapping) else {}


def _zero(zero: Mapping[str, Any]) -> dict[str, Any]:
    stage = zero.get("stage", 0)
    if stage not in _STRATEGY:
        raise NoCounterpart(f"zero_optimization.stage: {stage!r} is not known. Use 0, 1, 2 or 3.")
    found: dict[str, Any] = {"strategy": _STRATEGY[stage]}
    optimizer, params = _inner(zero, "offload_optimizer"), _inner(zero, "offload_param")
    if optimizer.get("device") in ("cpu", "nvme") or zero.get("cpu_offload") is True:
        found["parallel.offload"] = "optimizer"
    if params.get("device") in ("cpu", "nvme"):
        found["parallel.offload"] = "params"
    if optimizer.get("device") == "nvme" and optimizer.get("nvme_path"):
        found["parallel.offload_folder"] = str(optimizer["nvme_path"])
    return found


def _optimizer(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    kind = _given(optimizer, "type")
    found: dict[str, Any] = {}
    if kind is not None:
        if kind not in _OPTIMIZERS:
            raise NoCounterpart(f"optimizer.type: {kind!r} is not known. Remove it, and give optim in the config.")
        found["optim"] = _OPTIMIZERS[kind]
    params = _inner(optimizer, "params")
    found |= {ours: params[name] for name, ours in _OPTIMIZER_PARAMS.items() if _given(params, name) is not None}
    betas = _given(params, "betas")
    if isinstance(betas, list | tuple) and len(betas) == 2 and "auto" not in betas:
        found["adam_beta1"], found["adam_beta2"] = betas
    return found


def _scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    kind = _given(scheduler, "type")
    if kind is None:
        return {}
    if kind not in _SCHEDULES:
        raise NoCounterpart(
            f"scheduler.type: {kind!r} is not known. Remove it, and give lr_scheduler_type in the config."
        )
    params = _inner(scheduler, "params")
    found = {ours: params[name] for name, ours in _SCHEDULE_PARAMS.items() if _given(params, name) is not None}
    return {"lr_scheduler_type": _SCHEDULES[kind], **found}


def translate(value: Any) -> Translation:
    """A DeepSpeed config (its path, or the mapping itself) as keys of ours.

    Raises:
        NoCounterpart: the file cannot be read, or names a stage, optimizer or schedule that there is not.
    """
    config = read_mapping(value)
    zero = _inner(config, "zero_optimization")
    found = _zero(zero)
    size = _given(_inner(config, "tensor_parallel"), "autotp_size")
    if size and size > 1:
        found["parallel.tp"] = size
    found |= {precision: True for precision in ("bf16", "fp16") if _inner(config, precision).get("enabled") is True}
    found |= {ours: config[name] for name, ours in _SIMPLE.items() if _given(config, name) is not None}
    if "global_batch_size" in found:
        found.pop("gradient_accumulation_steps", None)  # DeepSpeed derives either from the other
    found |= _optimizer(_inner(config, "optimizer")) | _scheduler(_inner(config, "scheduler"))
    if _inner(config, "activation_checkpointing").get("cpu_checkpointing") is True:
        found["parallel.offload_activations"] = True
    left = sorted(set(config) - _READ - set(_SIMPLE)) + [
        f"zero_optimization.{name}" for name in sorted(set(zero) - _ZERO_READ)
    ]
    notes = (f"left to Fourfold's own engine: {', '.join(left)}",) if left else ()
    return Translation(found, notes)


class DeepSpeedKeys(Section):
    """The key that names a DeepSpeed config."""

    title: ClassVar[str] = "DeepSpeed"

    deepspeed: Any = translated(
        None,
        "DeepSpeed config: a JSON file, or its content as a mapping.",
        translate,
        "strategy (stage 0: ddp, 1: zero1, 2: zero2, 3: zero3), parallel.offload, parallel.tp and the optimizer's keys",
    )
