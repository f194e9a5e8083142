"""Keys of transformers' TrainingArguments that have another name here, or leave nothing to choose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from fourfold.config.compat.translation import renamed, settled, translated
from fourfold.config.generation import GenerationConfig
from fourfold.config.key import CommaList, NoCounterpart, Options, Section, Translation, later

_METRICS = "evaluation keeps sums and counts, never the predictions"
_UPLOAD = "uploads while training; export_hub_model_id uploads a finished model"
_TRACKIO = "the Trackio tracker"
_COMPILE = "layers are compiled by inductor, for all lengths at once"
_DDP = "the data-parallel engine finds this out by itself"
_LOADER = "the loader decides this by itself"
_THREAD = "steps are cut from tokens that are ready, which takes no time worth a process"
_OLD = "current versions of transformers have no such key either"
_RECOMPUTE = "checkpointing is never re-entrant and covers every layer"


def _sampling_order(value: str) -> Translation:
    if value == "sequential":
        return Translation({"disable_shuffling": True})
    return Translation({}, ("samples keep their random order; within a step they are cut to equal lengths anyway",))


def _generation(value: Any) -> Translation:
    if isinstance(value, str):
        path = Path(value)
        path = path / "generation_config.json" if path.is_dir() else path
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise NoCounterpart(
                f"{path} cannot be read as JSON ({error}). Give a file or folder of this machine."
            ) from error
    if not isinstance(value, Mapping):
        raise NoCounterpart(f"{value!r} is not a mapping. Give a file, or the keys themselves.")
    mine = {name: setting for name, setting in value.items() if name in GenerationConfig.model_fields}
    others = sorted(set(value) - set(mine))
    return Translation(mine, (f"{', '.join(others)} left to the model's own settings",) if others else ())


class TransformersKeys(Section):
    """Keys of Hugging Face's trainer, of version 5 and the ones that version 4 had."""

    title: ClassVar[str] = "Hugging Face Trainer"

    use_liger_kernel: bool = renamed(False, "Use Liger kernels.", "enable_liger_kernel")
    liger_kernel_config: Options | None = settled(
        None, "Which Liger kernels are used.", "enable_liger_kernel takes every one that fits the model"
    )
    activation_checkpointing: bool | None = renamed(
        None, "Compute activations again in the backward pass.", "gradient_checkpointing"
    )
    activation_checkpointing_kwargs: Options | None = settled(None, "Settings of checkpointing.", _RECOMPUTE)
    gradient_checkpointing_kwargs: Options | None = settled(None, "Settings of checkpointing.", _RECOMPUTE)
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"] = translated(
        "random", "Order of the samples.", _sampling_order, "disable_shuffling: true for sequential"
    )
    generation_max_length: int | None = renamed(None, "Longest sequence while predicting.", "max_length")
    generation_num_beams: int | None = renamed(None, "Beams while predicting.", "eval_num_beams")
    generation_config: Any = translated(
        None, "Sampling keys as a file or a mapping.", _generation, "the sampling keys it holds"
    )
    hub_token: str | None = renamed(None, "Token for the Hugging Face hub.", "hf_hub_token", secret=True)

    label_smoothing_factor: float = later(0.0, "Label smoothing.", "smoothed losses", blocks=True, ge=0, lt=1)
    auto_find_batch_size: bool = settled(
        False, "Cut the forward pass when memory runs out.", "micro-batches fit the memory from the start"
    )
    trackio_space_id: str | None = later(None, "Trackio space.", _TRACKIO)
    trackio_bucket_id: str | None = later(None, "Trackio bucket.", _TRACKIO)
    trackio_static_space_id: str | bool | None = later(None, "Trackio static space.", _TRACKIO)
    push_to_hub: bool = later(False, "Upload checkpoints.", _UPLOAD)
    hub_model_id: str | None = later(None, "Repository to upload to.", _UPLOAD)
    hub_private_repo: bool | None = later(None, "Make that repository private.", _UPLOAD)
    hub_strategy: str = later("every_save", "When to upload.", _UPLOAD)
    hub_always_push: bool = later(False, "Upload even if the last upload has not ended.", _UPLOAD)
    hub_revision: str | None = later(None, "Branch to upload to.", _UPLOAD)

    average_tokens_across_devices: bool = settled(
        True, "Average the loss over all devices' tokens.", "the loss is always a mean over the whole step's tokens"
    )
    bf16_full_eval: bool = settled(False, "Evaluate in bfloat16.", "evaluation has the precision of training")
    fp16_full_eval: bool = settled(False, "Evaluate in float16.", "evaluation has the precision of training")
    use_cache: bool = settled(
        False, "Cache keys while training.", "training needs none; see use_kv_cache for generation"
    )
    torch_compile_backend: str | None = settled(None, "Compiler backend.", _COMPILE)
    torch_compile_mode: str | None = settled(None, "Compiler mode.", _COMPILE)
    torch_empty_cache_steps: int | None = settled(
        None, "Steps between cache clearings.", "the allocator keeps its cache"
    )
    log_on_each_node: bool = settled(True, "Log on each node.", "rank 0 logs; warnings come from every rank")
    logging_nan_inf_filter: bool = settled(True, "Hide NaN losses.", "figures are logged as they are")
    log_level_replica: str = settled("warning", "Log level of other ranks.", "other ranks only warn")
    prediction_loss_only: bool = settled(False, "Evaluate the loss only.", "compute_accuracy asks for more")
    eval_do_concat_batches: bool = settled(True, "Join batches of predictions.", _METRICS)
    eval_use_gather_object: bool = settled(False, "Gather objects.", _METRICS)
    eval_accumulation_steps: int | None = settled(None, "Steps between moves of predictions.", _METRICS)
    include_for_metrics: CommaList = settled((), "What metrics are given.", _METRICS)
    batch_eval_metrics: bool = settled(False, "Metrics by batch.", _METRICS)
    label_names: CommaList = settled((), "Names of label columns.", "labels come from the template")
    remove_unused_columns: bool = settled(True, "Drop columns the model does not take.", "only tokens reach the model")
    length_column_name: str = settled("length", "Column of lengths.", "lengths are known from tokenising")
    save_on_each_node: bool = settled(False, "Save on each node.", "a checkpoint is written once")
    enable_jit_checkpoint: bool = settled(False, "Save on SIGTERM.", "SIGTERM always saves")
    restore_callback_states_from_checkpoint: bool = settled(
        False, "Restore callbacks.", "resuming always restores everything"
    )
    ignore_data_skip: bool = settled(
        False, "Start the data anew when resuming.", "resuming always goes on with the next sample"
    )
    accelerator_config: Any = settled(None, "Settings of accelerate's loader.", _LOADER)
    dataloader_num_workers: int = settled(0, "Processes that prepare batches.", _THREAD, ge=0)
    dataloader_prefetch_factor: int | None = settled(None, "Batches prepared ahead.", _THREAD)
    dataloader_pin_memory: bool = settled(True, "Copy batches from pinned memory.", _THREAD)
    dataloader_drop_last: bool = settled(
        False, "Leave out the last batch of an epoch.", "the last step of an epoch trains on what is left"
    )
    dataloader_persistent_workers: bool = settled(False, "Keep loader processes.", _LOADER)
    dataloader_multiprocessing_context: str | None = settled(None, "How loader processes start.", _LOADER)
    dataloader_in_order: bool = settled(True, "Batches in order.", "batches always come in order")
    sortish_sampler: bool = settled(False, "Sort roughly by length.", "samples keep their random order")
    ddp_find_unused_parameters: bool | None = settled(None, "Look for unused parameters.", _DDP)
    ddp_bucket_cap_mb: int | None = settled(None, "Size of gradient buckets.", _DDP)
    ddp_broadcast_buffers: bool | None = settled(None, "Broadcast buffers.", _DDP)
    ddp_static_graph: bool | None = settled(None, "The graph does not change.", _DDP)
    ddp_backend: str | None = settled(None, "Communication library.", "NCCL on GPUs, gloo on CPUs")
    debug: Any = settled("", "Debug options of the trainer.", "nothing here has a debug mode")
    skip_memory_metrics: bool = settled(True, "Leave memory out of the report.", "peak memory is always reported")
    local_rank: int = settled(-1, "Rank on this machine.", "the launcher's LOCAL_RANK is taken")

    evaluation_strategy: Literal["no", "steps", "epoch"] = renamed("no", "When to evaluate.", "eval_strategy")
    no_cuda: bool = renamed(False, "Train on the CPU.", "use_cpu")
    include_tokens_per_second: bool = renamed(False, "Log tokens per second.", "include_effective_tokens_per_second")
    push_to_hub_model_id: str | None = later(None, "Repository to upload to.", _UPLOAD)
    group_by_length: bool = settled(False, "Batches of like length.", "a step is cut to equal lengths anyway")
    logging_dir: str | None = settled(None, "TensorBoard's folder.", "it is runs/ in output_dir")
    save_safetensors: bool = settled(True, "Write safetensors.", "only safetensors files are written")
    half_precision_backend: str = settled("auto", "Mixed-precision library.", "PyTorch's own is used")
    fp16_backend: str = settled("auto", "Mixed-precision library.", "PyTorch's own is used")
    fp16_opt_level: str = settled("O1", "Apex level.", "PyTorch's own mixed precision is used")
    jit_mode_eval: bool = settled(False, "Trace the model for evaluation.", _OLD)
    use_ipex: bool = settled(False, "Intel extension.", _OLD)
    use_mps_device: bool = settled(False, "Use Apple's GPU.", "the device is found by itself")
    past_index: int = settled(-1, "Index of past states.", _OLD)
    include_inputs_for_metrics: bool = settled(False, "Give inputs to metrics.", _METRICS)
    dispatch_batches: bool | None = settled(None, "Rank 0 reads for all.", _LOADER)
    split_batches: bool | None = settled(None, "Split one batch over the devices.", _LOADER)
