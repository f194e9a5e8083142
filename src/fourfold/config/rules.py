"""Checks across keys, one small function each; every one is run, and all problems are reported together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.config import reward_rules
from fourfold.config.device import gpu_visible
from fourfold.config.key import Status
from fourfold.config.schema import Run, table
from fourfold.config.second import distillation_problems, needs_teacher

Verb = Literal["train", "plan", "rehearse", "chat", "export", "data"]

Rule = Callable[[Run], Iterator[str]]

_CHAT_STAGES = ("sft", "kd")
"""Stages that train on the answers of chats."""
_WITHOUT_GPU = "Use fp16: false to compute in fp32; bf16: true is fast only on CPUs with AVX512-BF16 or AMX."


def check(run: Run, verb: Verb) -> None:
    """Check what a verb needs of a run that was loaded.

    Raises:
        ConfigError: with every problem.
    """
    problems = tuple(requirements(run, verb))
    if problems:
        raise ConfigError(problems)


def contradictions(run: Run) -> Iterator[str]:
    """Keys that contradict each other, whatever the verb."""
    for rule in _CONTRADICTIONS:
        yield from rule(run)


def requirements(run: Run, verb: Verb) -> Iterator[str]:
    """What a verb needs: keys that must be given, a device, a version that has the feature."""
    for rule in _REQUIREMENTS[verb]:
        yield from rule(run)


def _one_precision(run: Run) -> Iterator[str]:
    training = run.training
    given = [name for name in ("fp16", "bf16", "pure_bf16") if getattr(training, name)]
    if training.fp16 and len(given) > 1:
        yield f"{given[1]}: true and fp16: true contradict each other. Keep one of them."
    if training.fp16 and training.use_cpu:
        yield f"fp16: true needs a GPU, but use_cpu is true. {_WITHOUT_GPU} Or remove use_cpu."


def _float8(run: Run) -> Iterator[str]:
    training, kind = run.training, run.tuning.finetuning_type
    if not training.fp8:
        return
    if kind == "lora":
        yield "fp8: true multiplies with trained matrices, but finetuning_type: lora trains none. Remove fp8."
    if not (training.bf16 or training.pure_bf16):
        yield "fp8: true computes the rest in bf16. Give bf16: true as well, or remove fp8."


def _async_is_sharded(run: Run) -> Iterator[str]:
    if run.output.async_save and run.output.save_sharded is False:
        yield (
            "save_sharded: false contradicts async_save: true, which writes sharded checkpoints. "
            "Use save_sharded: auto, or async_save: false."
        )


def _packing_stage(run: Run) -> Iterator[str]:
    stage = run.training.stage
    if run.data.packing and stage not in ("pt", *_CHAT_STAGES):
        name = "neat_packing" if run.data.neat_packing else "packing"
        yield f"{name}: true works with stage pt, sft or kd only, but stage is {stage}. Remove {name}."
    if run.data.neat_packing and run.source.get("packing") is False:
        yield "neat_packing: true packs, but packing is false. Remove one of the two."


def _prompt_training(run: Run) -> Iterator[str]:
    stage = run.training.stage
    for name in ("train_on_prompt", "mask_history"):
        if getattr(run.data, name) and stage not in _CHAT_STAGES:
            yield f"{name}: true works with stage sft or kd only, but stage is {stage}. Remove {name}."
    if run.data.train_on_prompt and run.data.mask_history:
        yield "mask_history: true and train_on_prompt: true contradict each other. Keep one of them."


def _dynamic_loss(run: Run) -> Iterator[str]:
    if run.training.use_dft_loss and run.training.stage != "sft":
        yield f"use_dft_loss: true works with stage sft only, but stage is {run.training.stage}. Remove use_dft_loss."


def _generated_answers(run: Run) -> Iterator[str]:
    training = run.training
    if not training.predict_with_generate:
        return
    if training.stage not in _CHAT_STAGES:
        yield (
            f"predict_with_generate: true answers prompts, which stage {training.stage} does not have. Remove it, or "
            "use stage sft."
        )
    if not (training.do_eval or training.do_predict):
        yield "predict_with_generate: true needs do_eval or do_predict. Set one of them, or remove it."


def _streaming(run: Run) -> Iterator[str]:
    data = run.data
    if not data.streaming:
        return
    if data.max_samples is not None:
        yield f"max_samples: {data.max_samples} does not work with streaming: true. Remove one of them; use max_steps."
    if 0 < data.val_size < 1:
        yield f"val_size: {data.val_size:g} is a share, but a stream has no length. Give a number of rows."
    strategies = {
        "eval_strategy": run.training.eval_strategy,
        "save_strategy": run.output.save_strategy,
        "logging_strategy": run.output.logging_strategy,
    }
    for name, strategy in strategies.items():
        if strategy == "epoch":
            yield f"{name}: epoch does not work with streaming: true, since a stream has no known end. Use steps."


def _evaluation_sets(run: Run) -> Iterator[str]:
    data = run.data
    if data.val_size and data.eval_dataset:
        listed = ",".join(data.eval_dataset)
        yield f"val_size: {data.val_size:g} and eval_dataset: {listed} contradict each other. Keep one of them."
    if data.val_size > 1 and data.val_size != int(data.val_size):
        yield f"val_size: {data.val_size:g} is neither a share below 1 nor a whole number of rows. Use one of these."
    if data.val_size and not (data.dataset or data.tokenized_path):
        yield f"val_size: {data.val_size:g} holds out rows of dataset, which is not given. Give eval_dataset instead."
    if data.eval_on_each_dataset and not data.eval_dataset:
        yield "eval_on_each_dataset: true needs eval_dataset. Give it, or remove eval_on_each_dataset."


def _mixing(run: Run) -> Iterator[str]:
    data = run.data
    if not data.interleave_probs:
        return
    if data.mix_strategy == "concat":
        yield "interleave_probs: has no meaning with mix_strategy: concat. Use interleave_under or interleave_over."
    if len(data.interleave_probs) != len(data.dataset):
        yield (
            f"interleave_probs: has {len(data.interleave_probs)} values, but dataset names {len(data.dataset)}. "
            f"Give one for each."
        )
    if any(probability < 0 for probability in data.interleave_probs) or sum(data.interleave_probs) <= 0:
        yield "interleave_probs: must not be negative, nor all zero. Correct them."
    elif abs(sum(data.interleave_probs) - 1) > 1e-6:
        yield f"interleave_probs: add up to {sum(data.interleave_probs):g}. Make them add up to 1."


def _quantisation(run: Run) -> Iterator[str]:
    model, tuning = run.model, run.tuning
    if model.quantization_bit is None:
        return
    bits = f"quantization_bit: {model.quantization_bit}"
    if tuning.finetuning_type != "lora":
        yield f"{bits} works with finetuning_type: lora only, but it is {tuning.finetuning_type}. Change one of them."
    if tuning.pissa_init:
        yield f"{bits} does not work with pissa_init: true, which changes the base weights. Remove one of them."
    if model.resize_vocab:
        yield f"{bits} does not work with resize_vocab: true. Remove one of them."
    if model.train_from_scratch:
        yield f"{bits} does not work with train_from_scratch: true: there is nothing to quantise. Remove one of them."
    if tuning.create_new_adapter and model.adapter_name_or_path:
        yield f"{bits} does not work with create_new_adapter: true, which merges into the base. Remove one of them."
    if len(model.adapter_name_or_path) > 1:
        yield f"{bits} takes one adapter, but adapter_name_or_path has several. Merge them first, by `fourfold export`."


_LORA_ONLY = ("additional_target", "loraplus_lr_ratio", "use_rslora", "use_dora", "pissa_init", "create_new_adapter")


def _lora_only(run: Run) -> Iterator[str]:
    tuning = run.tuning
    kind = tuning.finetuning_type
    if kind == "lora":
        if tuning.pissa_convert and not tuning.pissa_init:
            yield "pissa_convert: true converts what pissa_init began, but pissa_init is false. Set it, or remove this."
        if tuning.create_new_adapter and not run.model.adapter_name_or_path:
            yield "create_new_adapter: true needs adapter_name_or_path. Give it, or remove create_new_adapter."
        return
    for name in _LORA_ONLY:
        if getattr(tuning, name):
            yield f"{name}: works with finetuning_type: lora only, but it is {kind}. Remove {name}, or use lora."
    if run.model.adapter_name_or_path:
        yield (
            f"adapter_name_or_path: is given, but finetuning_type is {kind}. Use finetuning_type: lora, "
            f"or merge the adapter first with `fourfold export`."
        )


def _freeze(run: Run) -> Iterator[str]:
    tuning = run.tuning
    if tuning.finetuning_type == "freeze" and tuning.freeze_trainable_layers == 0 and not tuning.freeze_extra_modules:
        yield (
            "freeze_trainable_layers: 0 trains no layer. Use n for the last n layers, -n for the first n, or name some "
            "freeze_extra_modules."
        )


def _best_checkpoint(run: Run) -> Iterator[str]:
    training, output = run.training, run.output
    wants = {
        "early_stopping_steps": training.early_stopping_steps is not None,
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy": output.save_strategy == "best",
        "eval_on_start": training.eval_on_start,
    }
    for name, wanted in wants.items():
        if wanted and training.eval_strategy == "no":
            yield f"{name}: needs evaluation while training, but eval_strategy is no. Use eval_strategy: steps."
    if not training.load_best_model_at_end or training.eval_strategy == "no" or output.save_strategy == "best":
        return
    if output.save_strategy != training.eval_strategy:
        yield (
            f"load_best_model_at_end: needs a checkpoint of every evaluation, but save_strategy is "
            f"{output.save_strategy} and eval_strategy {training.eval_strategy}. Make them the same."
        )
    elif training.eval_strategy == "steps" and training.eval_steps and output.save_steps % training.eval_steps:
        yield (
            f"load_best_model_at_end: needs save_steps ({output.save_steps}) to be a multiple of eval_steps "
            f"({training.eval_steps}). Change one of them."
        )


def _resume(run: Run) -> Iterator[str]:
    if run.output.resume_from_checkpoint and run.output.overwrite_output_dir:
        yield (
            "overwrite_output_dir: true deletes what resume_from_checkpoint goes on from. Keep one: "
            "resume_from_checkpoint to go on, overwrite_output_dir to begin anew."
        )


def _batch(run: Run) -> Iterator[str]:
    training = run.training
    if training.global_batch_size is None:
        return
    if training.gradient_accumulation_steps > 1:
        yield (
            f"global_batch_size: {training.global_batch_size} says how many sequences a step has, and so does "
            f"gradient_accumulation_steps: {training.gradient_accumulation_steps}. Keep one of them."
        )


def _checkpointing(run: Run) -> Iterator[str]:
    if run.training.gradient_checkpointing and run.training.disable_gradient_checkpointing:
        yield "disable_gradient_checkpointing: true and gradient_checkpointing: true contradict each other. Keep one."
    asked, on = run.parallel.recompute, run.training.gradient_checkpointing
    if asked != "auto" and on is not None and on == (asked == "none"):
        given = f"gradient_checkpointing: {str(on).lower()}"
        yield f"parallel.recompute: {asked} and {given} contradict each other. Keep one."


def _offload(run: Run) -> Iterator[str]:
    asked, optim = run.parallel.offload, run.training.optim
    if run.parallel.offload_folder and asked == "none":
        yield (
            f"parallel.offload_folder: {run.parallel.offload_folder} holds what is offloaded, but parallel.offload is "
            "none. Set parallel.offload: optimizer."
        )
    if asked == "optimizer" and optim != "adamw_torch":
        yield f"parallel.offload: optimizer is AdamW's, and optim is {optim}. Use optim: adamw_torch."
    if asked != "none" and run.training.fp16:
        yield f"parallel.offload: {asked} does not go with fp16, which checks gradients on the GPU. Use bf16: true."


_SCHEDULE_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def _schedule(run: Run) -> Iterator[str]:
    training = run.training
    kind, needs = training.lr_scheduler_type, _SCHEDULE_NEEDS.get(training.lr_scheduler_type, ())
    if needs and not set(needs) & set(training.lr_scheduler_kwargs):
        listed = " or ".join(needs)
        yield f"lr_scheduler_type: {kind} needs {listed}. Give lr_scheduler_kwargs: {{{needs[0]}: ...}}."
    if kind in ("constant", "constant_with_warmup") and training.lr_scheduler_kwargs:
        yield f"lr_scheduler_kwargs: lr_scheduler_type: {kind} has no further settings. Remove lr_scheduler_kwargs."
    if kind in ("reduce_lr_on_plateau", "greedy") and training.eval_strategy == "no":
        yield f"lr_scheduler_type: {kind} follows the evaluation loss, but eval_strategy is no. Use steps or epoch."


def _needs_model(run: Run) -> Iterator[str]:
    if not run.model.model_name_or_path:
        yield "model_name_or_path: is not given. Give a hub id, a folder or a .gguf file."


def _needs_output(run: Run) -> Iterator[str]:
    if not run.output.output_dir:
        yield "output_dir: is not given. Give a folder for the adapter or model, checkpoints and logs."


def _needs_export_dir(run: Run) -> Iterator[str]:
    if not run.export.export_dir:
        yield "export_dir: is not given. Give a folder for the merged model."


def _needs_dataset(run: Run) -> Iterator[str]:
    path = run.data.tokenized_path
    prepared = path is not None and Path(path).exists()
    if run.training.do_train and not run.data.dataset and not prepared:
        yield "dataset: is not given, but do_train is true. Name one or more data sets of dataset_info.json."


def _has_work(run: Run) -> Iterator[str]:
    training = run.training
    if not (training.do_train or training.do_eval or training.do_predict):
        yield "do_train: is false, and neither do_eval nor do_predict is true. Set the one that is meant."


def _needs_any_dataset(run: Run) -> Iterator[str]:
    if not (run.data.dataset or run.data.eval_dataset or run.data.tokenized_path):
        yield "dataset: is not given. Name one or more data sets of dataset_info.json."


def _needs_eval_data(run: Run) -> Iterator[str]:
    training, data = run.training, run.data
    if data.eval_dataset or data.val_size or (data.tokenized_path and Path(data.tokenized_path).exists()):
        return
    asked = {
        f"eval_strategy: {training.eval_strategy}": training.eval_strategy != "no",
        "do_predict: true": training.do_predict,
        "do_eval: true": training.do_eval and training.eval_strategy == "no",
    }
    for name, wanted in asked.items():
        if wanted:
            yield f"{name} needs data to evaluate on. Give eval_dataset, or val_size to hold rows of dataset out."


def _stream_length(run: Run) -> Iterator[str]:
    if run.data.streaming and run.training.do_train and run.training.max_steps <= 0:
        yield "max_steps: is needed with streaming: true, since a stream has no length. Give the number of steps."


def _fp16_device(run: Run) -> Iterator[str]:
    if run.training.fp16 and not run.training.use_cpu and not gpu_visible():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
        why = "CUDA_VISIBLE_DEVICES hides them all" if hidden else "this machine has none"
        yield f"fp16: true needs a GPU, but {why}. {_WITHOUT_GPU}"


def _stage_exists(run: Run) -> Iterator[str]:
    stages = registry.names("fourfold.objectives")
    if run.training.stage not in stages:
        yield (
            f"stage: {run.training.stage} comes with a later version; this one trains {', '.join(stages)}. "
            f"`fourfold data` checks its data already."
        )


def _engine_exists(run: Run) -> Iterator[str]:
    if run.model.infer_backend == "vllm":
        yield (
            "infer_backend: vllm comes with a later version. Use infer_backend: huggingface, or serve the exported "
            "model with vLLM itself."
        )


def _later_losses(run: Run) -> Iterator[str]:
    for name, value in run.source.items():
        key = table().get(name)
        if key and key.spec.status is Status.LATER and key.spec.blocks and value not in (key.default, None, "false"):
            yield f"{name}: changes the loss, and comes with a later version. Remove it to train with the plain loss."


_CONTRADICTIONS: tuple[Rule, ...] = (
    _one_precision,
    _float8,
    _packing_stage,
    _async_is_sharded,
    _prompt_training,
    _dynamic_loss,
    _generated_answers,
    distillation_problems,
    _streaming,
    _evaluation_sets,
    _mixing,
    _quantisation,
    _lora_only,
    _freeze,
    _best_checkpoint,
    _resume,
    _batch,
    _checkpointing,
    _offload,
    _schedule,
    reward_rules.reward_model,
    reward_rules.reward_weights,
    reward_rules.groups,
    reward_rules.overlong,
)

_REQUIREMENTS: dict[Verb, tuple[Rule, ...]] = {
    "train": (
        _needs_model,
        needs_teacher,
        _needs_output,
        _has_work,
        _needs_dataset,
        _needs_eval_data,
        _stream_length,
        _fp16_device,
        _stage_exists,
        reward_rules.needs_reward,
        _later_losses,
    ),
    "plan": (_needs_model, needs_teacher),
    "rehearse": (_needs_model, needs_teacher),
    "data": (_needs_model, _needs_any_dataset),
    "chat": (_needs_model, _engine_exists),
    "export": (_needs_model, _needs_export_dir),
}
