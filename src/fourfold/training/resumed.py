"""What a run that is resumed must have in common with the one that wrote the checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fourfold.base.errors import CheckpointError
from fourfold.checkpoint.resume import named_checkpoint
from fourfold.config.schema import Run
from fourfold.models.adapters import identify_base, plan_adapters
from fourfold.models.identity import BaseIdentity
from fourfold.models.source import explained, model_name
from fourfold.training.state import FILE, refuse_changes

_LORA = ("lora_rank", "lora_alpha", "lora_target", "additional_target", "use_rslora", "use_dora", "pissa_init")
_FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")


def settings_of(run: Run) -> dict[str, Any]:
    """The settings that say which function is trained, and on which samples in which order, by their keys.

    What says how it is trained is not among them, and may change: rates, schedules, dropout and noise, precision,
    layout, how a step is cut, what is logged and saved.
    """
    training, model, tuning = run.training, run.model, run.tuning
    found: dict[str, Any] = {
        "stage": training.stage,
        "seed": training.seed,
        "data_seed": training.data_seed,
        "shuffle": not training.disable_shuffling,
        "train_from_scratch": model.train_from_scratch,
        "rope_scaling": model.rope_scaling,
        "resize_vocab": model.resize_vocab,
        "quantization_bit": model.quantization_bit,
        "finetuning_type": tuning.finetuning_type,
    }
    if model.quantization_bit == 4:
        found |= {"quantization_type": model.quantization_type, "double_quantization": model.double_quantization}
    keys: tuple[str, ...] = ()
    if tuning.finetuning_type == "freeze":
        keys = _FREEZE
    elif tuning.finetuning_type == "lora":
        plan = plan_adapters(model, tuning, trainable=True)
        found["adapter_name_or_path"] = f"{len(plan.merged)} merged"
        keys = _LORA if plan.continued is None else ()  # one that is trained further has its own
    values = tuning.model_dump()
    return found | {key: _plain(values[key]) for key in keys}


def _plain(value: object) -> object:
    """A value as JSON keeps it; the order of a list of names says nothing."""
    return ",".join(sorted(value)) if isinstance(value, tuple) else value


def check_settings(run: Run, output_dir: Path) -> None:
    """Refuse to resume with settings that make it another run, before anything is loaded.

    Raises:
        CheckpointError: names each setting with both values.
    """
    folder = _resumed(run, output_dir)
    if folder is not None:
        refuse_changes(folder, _record(folder).get("facts", {}), settings_of(run))


def check_base(run: Run, output_dir: Path) -> None:
    """Refuse to resume on another base model, before its weights are loaded.

    A base that only lies elsewhere is the same, and so is one whose weights cannot be told apart.

    Raises:
        CheckpointError: the weights are others than those that the checkpoint was trained on.
        ModelError: the base model's files are damaged.
    """
    folder = _resumed(run, output_dir)
    content = None if folder is None else _record(folder).get("base")
    if content is None:
        return
    recorded = BaseIdentity(**{**content, "merged": tuple(content["merged"])})
    with explained(model_name(run.model), "the model"):
        base = identify_base(run.model, run.tuning)
    if base is not None and not recorded.same_weights(base):
        raise CheckpointError(
            f"{folder}: was trained on {recorded.name}, whose weights are not those of {base.name}. Set "
            "model_name_or_path to that model, or start a new run in another output_dir."
        )


def base_as_json(base: BaseIdentity | None) -> dict[str, Any] | None:
    """What `check_base` reads."""
    return None if base is None else asdict(base)


def _resumed(run: Run, output_dir: Path) -> Path | None:
    resume = run.output.resume_from_checkpoint
    return named_checkpoint(resume, output_dir) if resume and run.training.do_train else None


def _record(folder: Path) -> dict[str, Any]:
    """What Fourfold wrote into a checkpoint's state; nothing where it is damaged, which is told when it is verified."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8")).get("fourfold", {})
    except (OSError, ValueError):
        return {}
