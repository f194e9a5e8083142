"""FSDP as Hugging Face's trainer and accelerate's config file describe it, mapped onto the strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fourfold.config.compat import deepspeed
from fourfold.config.compat.files import read_mapping
from fourfold.config.compat.translation import settled, translated
from fourfold.config.key import NoCounterpart, Section, Translation

_SHARDING: Mapping[str, Mapping[str, Any]] = {
    "full_shard": {"strategy": "fsdp"},
    "shard_grad_op": {"strategy": "zero2"},
    "hybrid_shard": {"strategy": "hsdp"},
    "hybrid_shard_zero2": {"strategy": "hsdp", "parallel.reshard_after_forward": False},
    "no_shard": {"strategy": "ddp"},
    "offload": {"parallel.offload": "params"},
    "auto_wrap": {},
}
_BY_NUMBER = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2")
_WRAPPING = "each decoder layer is a unit of FSDP"

_AXES = {
    "dp_replicate_size": "parallel.dp_replicate",
    "dp_shard_size": "parallel.dp_shard",
    "tp_size": "parallel.tp",
    "cp_size": "parallel.cp",
    "pp_size": "parallel.pp",
    "ep_size": "parallel.ep",
}
_MACHINE = {"main_training_function", "compute_environment", "debug", "rdzv_backend", "same_network", "use_cpu"}


def _sharding(name: str) -> Mapping[str, Any]:
    if name not in _SHARDING:
        raise NoCounterpart(f"{name!r} is not known. Use {', '.join(_SHARDING)}.")
    return _SHARDING[name]


def translate_fsdp(value: Any) -> Translation:
    """The words of `fsdp: "full_shard auto_wrap"`; true alone means full_shard.

    Raises:
        NoCounterpart: a word that there is not.
    """
    if isinstance(value, bool):
        return Translation({"strategy": "fsdp"} if value else {})
    text = value if isinstance(value, str) else " ".join(map(str, value or ()))
    found: dict[str, Any] = {}
    for word in text.replace(",", " ").split():
        found |= _sharding(word.lower())
    return Translation(found)


def translate_fsdp_config(value: Any) -> Translation:
    """An FSDP config of the trainer or of accelerate (names with or without `fsdp_`), as path or mapping.

    Raises:
        NoCounterpart: the file cannot be read, or a sharding strategy that there is not.
    """
    config = {str(name).removeprefix("fsdp_"): setting for name, setting in read_mapping(value).items()}
    found: dict[str, Any] = {}
    reshard = config.pop("reshard_after_forward", None)
    sharding = config.pop("sharding_strategy", reshard if isinstance(reshard, str) else None)
    if sharding is not None and str(sharding).lower() not in ("true", "false"):
        text = str(sharding)
        found |= _sharding(_BY_NUMBER[int(text) - 1] if text in "12345" else text.lower())
    elif reshard is not None:
        found["parallel.reshard_after_forward"] = str(reshard).lower() == "true"
    offload = [config.pop(name, False) for name in ("cpu_offload", "offload_params")]
    if any(str(one).lower() == "true" for one in offload):
        found["parallel.offload"] = "params"
    if str(config.pop("activation_checkpointing", False)).lower() == "true":
        found["gradient_checkpointing"] = True
    left = sorted(set(config) - {"version"})
    return Translation(found, (f"left to Fourfold's own engine: {', '.join(left)}",) if left else ())


def translate_parallelism(value: Any) -> Translation:
    """accelerate's ParallelismConfig as mapping or file: sizes by axis, with or without `parallelism_config_`.

    Raises:
        NoCounterpart: the file cannot be read.
    """
    config = {str(name).removeprefix("parallelism_config_"): size for name, size in read_mapping(value).items()}
    found = {_AXES[name]: size for name, size in config.items() if name in _AXES and size is not None and size > 1}
    left = sorted(set(config) - set(_AXES))
    return Translation(found, (f"left to Fourfold's own engine: {', '.join(left)}",) if left else ())


def translate_accelerate(value: Any) -> Translation:
    """The file that `accelerate config` writes.

    Raises:
        NoCounterpart: the file cannot be read, or describes something that there is not.
    """
    config = dict(read_mapping(value))
    kind = str(config.pop("distributed_type", "NO")).upper()
    parts: list[Translation] = []
    fsdp, zero, axes = (config.pop(name, None) for name in ("fsdp_config", "deepspeed_config", "parallelism_config"))
    if kind == "FSDP":
        parts += [Translation({"strategy": "fsdp"}), translate_fsdp_config(fsdp or {})]
    elif kind == "DEEPSPEED":
        parts.append(_accelerate_deepspeed(zero or {}))
    elif kind.startswith("MULTI_"):
        parts.append(Translation({"strategy": "ddp"}))
    elif kind != "NO":
        raise NoCounterpart(f"distributed_type: {kind!r} is not known. Use FSDP, DEEPSPEED, MULTI_GPU or NO.")
    if axes:
        parts.append(translate_parallelism(axes))
    precision = str(config.pop("mixed_precision", "no"))
    if precision in ("bf16", "fp16"):
        parts.append(Translation({precision: True}))
    machines, processes = int(config.pop("num_machines", 1)), int(config.pop("num_processes", 0))
    if processes > 1:
        parts.append(Translation({"nproc": processes // machines}))
    left = sorted(set(config) - _MACHINE)
    notes = tuple(note for part in parts for note in part.notes)
    if left:
        notes += (f"left to the launcher: {', '.join(left)}",)
    return Translation({name: one for part in parts for name, one in part.values.items()}, notes)


def _accelerate_deepspeed(config: Mapping[str, Any]) -> Translation:
    if "deepspeed_config_file" in config:
        return deepspeed.translate(config["deepspeed_config_file"])
    zero: dict[str, Any] = {"stage": config.get("zero_stage", 2)}
    for ours, theirs in (("offload_optimizer", "offload_optimizer_device"), ("offload_param", "offload_param_device")):
        if config.get(theirs) in ("cpu", "nvme"):
            zero[ours] = {"device": config[theirs]}
    known = ("gradient_accumulation_steps", "gradient_clipping")
    return deepspeed.translate({"zero_optimization": zero, **{name: config[name] for name in known if name in config}})


class AccelerateKeys(Section):
    """FSDP keys of Hugging Face's trainer, and accelerate's config file."""

    title: ClassVar[str] = "Accelerate"

    fsdp: bool | str | tuple[str, ...] | None = translated(
        None, 'Words such as "full_shard auto_wrap".', translate_fsdp, "strategy and parallel.offload"
    )
    fsdp_config: Any = translated(
        None,
        "FSDP settings: a file or a mapping.",
        translate_fsdp_config,
        "strategy, parallel.reshard_after_forward, parallel.offload and gradient_checkpointing",
    )
    fsdp_min_num_params: int = settled(0, "Size from which a module is a unit of FSDP.", _WRAPPING)
    fsdp_transformer_layer_cls_to_wrap: str | None = settled(None, "Class that is a unit of FSDP.", _WRAPPING)
    parallelism_config: Any = translated(
        None, "Sizes by axis, as accelerate names them.", translate_parallelism, "the axes of the mapping parallel"
    )
    accelerate_config: str | None = translated(
        None,
        "The file that `accelerate config` writes.",
        translate_accelerate,
        "strategy, the mapping parallel, nproc, bf16 and fp16",
    )
