"""Checks across keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import ConfigError
from fourfold.config import device
from fourfold.config.load import load
from fourfold.config.rules import Verb, check


def problems_of(keys: dict[str, Any], verb: Verb | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(keys, verb=verb)
    return caught.value.problems


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"fp16": True, "bf16": True}, "bf16: true and fp16: true contradict"),
        ({"fp16": True, "pure_bf16": True}, "pure_bf16: true and fp16: true contradict"),
        ({"fp16": True, "use_cpu": True}, "fp16: true needs a GPU, but use_cpu is true. Use fp16: false"),
        ({"packing": True, "stage": "dpo"}, "packing: true works with stage pt, sft or kd only, but stage is dpo"),
        ({"neat_packing": True, "stage": "rm"}, "neat_packing: true works with stage pt, sft or kd only"),
        ({"neat_packing": True, "packing": False}, "neat_packing: true packs, but packing is false"),
        ({"train_on_prompt": True, "stage": "pt"}, "train_on_prompt: true works with stage sft or kd only"),
        ({"mask_history": True, "stage": "kto"}, "mask_history: true works with stage sft or kd only"),
        ({"mask_history": True, "train_on_prompt": True}, "mask_history: true and train_on_prompt: true contradict"),
        ({"streaming": True, "max_samples": 5}, "max_samples: 5 does not work with streaming"),
        ({"streaming": True, "dataset": "a", "val_size": 0.1}, "val_size: 0.1 is a share, but a stream"),
        ({"streaming": True, "save_strategy": "epoch"}, "save_strategy: epoch does not work with streaming"),
        ({"dataset": "a", "val_size": 0.1, "eval_dataset": "b"}, "val_size: 0.1 and eval_dataset: b contradict"),
        ({"dataset": "a", "val_size": 1.5}, "val_size: 1.5 is neither a share"),
        ({"val_size": 0.1}, "val_size: 0.1 holds out rows of dataset, which is not given"),
        ({"eval_on_each_dataset": True}, "eval_on_each_dataset: true needs eval_dataset"),
        ({"dataset": "a", "interleave_probs": "1"}, "interleave_probs: has no meaning with mix_strategy: concat"),
        (
            {"dataset": "a,b", "mix_strategy": "interleave_under", "interleave_probs": [1.0]},
            "interleave_probs: has 1 values, but dataset names 2",
        ),
        (
            {"dataset": "a,b", "mix_strategy": "interleave_under", "interleave_probs": "0.5,0.6"},
            "interleave_probs: add up to 1.1",
        ),
        ({"reward_model": "m", "reward_model_type": "api"}, "reward_model: m is no address"),
        ({"reward_model": "http://a/b"}, "reward_model: http://a/b is an address, but reward_model_type is lora"),
        (
            {"reward_funcs": "a:f,b:f", "reward_model": "m", "reward_weights": "1,2"},
            "reward_weights: has 2 values for 3 rewards (a:f, b:f, reward_model)",
        ),
        ({"reward_weights": 1}, "reward_weights: has 1 values for 0 rewards. Give one"),
        ({"stage": "grpo", "num_generations": 1}, "num_generations: 1 leaves nothing to compare"),
        ({"overlong_buffer": 65, "max_new_tokens": 64}, "overlong_buffer: 65 is longer than max_new_tokens (64)"),
        ({"quantization_bit": 4, "finetuning_type": "full"}, "quantization_bit: 4 works with finetuning_type: lora"),
        ({"quantization_bit": "8", "finetuning_type": "freeze"}, "quantization_bit: 8 works with"),
        ({"quantization_bit": 4, "pissa_init": True}, "quantization_bit: 4 does not work with pissa_init"),
        ({"quantization_bit": 4, "resize_vocab": True}, "quantization_bit: 4 does not work with resize_vocab"),
        ({"quantization_bit": 4, "train_from_scratch": True}, "quantization_bit: 4 does not work with train_from"),
        ({"quantization_bit": 4, "adapter_name_or_path": "a,b"}, "quantization_bit: 4 takes one adapter"),
        ({"finetuning_type": "full", "use_dora": True}, "use_dora: works with finetuning_type: lora only"),
        ({"finetuning_type": "freeze", "loraplus_lr_ratio": 16}, "loraplus_lr_ratio: works with"),
        ({"finetuning_type": "full", "adapter_name_or_path": "a"}, "adapter_name_or_path: is given, but"),
        ({"pissa_convert": True}, "pissa_convert: true converts what pissa_init began"),
        ({"create_new_adapter": True}, "create_new_adapter: true needs adapter_name_or_path"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "freeze_trainable_layers: 0 trains no layer"),
        ({"early_stopping_steps": 3}, "early_stopping_steps: needs evaluation while training"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: needs evaluation while training"),
        ({"save_strategy": "best"}, "save_strategy: needs evaluation while training"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            "load_best_model_at_end: needs a checkpoint of every evaluation, but save_strategy is steps",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 10},
            "load_best_model_at_end: needs save_steps (10) to be a multiple of eval_steps (3)",
        ),
        ({"resume_from_checkpoint": True, "overwrite_output_dir": True}, "overwrite_output_dir: true deletes"),
        (
            {"predict_with_generate": True, "do_predict": True, "stage": "pt"},
            "predict_with_generate: true answers prompts, which stage pt does not have",
        ),
        ({"predict_with_generate": True, "do_train": True}, "predict_with_generate: true needs do_eval or do_predict"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 4}, "global_batch_size: 8 says how many"),
        (
            {"disable_gradient_checkpointing": True, "gradient_checkpointing": True},
            "disable_gradient_checkpointing: true and gradient_checkpointing: true contradict",
        ),
        ({"parallel": {"offload_folder": "/nvme"}}, "parallel.offload_folder: /nvme holds what is offloaded, but"),
        (
            {"parallel": {"offload": "optimizer"}, "optim": "sgd"},
            "parallel.offload: optimizer is AdamW's, and optim is",
        ),
        (
            {"gradient_checkpointing": True, "parallel": {"recompute": "none"}},
            "parallel.recompute: none and gradient_checkpointing: true contradict",
        ),
        ({"fp8": True, "bf16": True}, "fp8: true multiplies with trained matrices, but finetuning_type: lora"),
        ({"fp8": True, "finetuning_type": "full"}, "fp8: true computes the rest in bf16. Give bf16: true"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type: cosine_with_min_lr needs min_lr or"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: reduce_lr_on_plateau follows"),
    ],
)
def test_load_when_keys_contradict_says_which(keys: dict[str, Any], expected: str) -> None:
    found = problems_of(keys)
    assert len(found) == 1
    assert found[0].startswith(expected)


TRAINABLE = {"model_name_or_path": "m", "output_dir": "o", "dataset": "d", "do_train": True}


@pytest.mark.parametrize(
    ("verb", "keys", "expected"),
    [
        ("train", {"model_name_or_path": None}, "model_name_or_path: is not given"),
        ("train", {"output_dir": None}, "output_dir: is not given"),
        ("train", {"dataset": None}, "dataset: is not given, but do_train is true"),
        ("train", {"do_train": False}, "do_train: is false, and neither do_eval nor do_predict is true"),
        ("train", {"streaming": True}, "max_steps: is needed with streaming"),
        ("train", {"eval_strategy": "steps"}, "eval_strategy: steps needs data to evaluate on"),
        ("train", {"do_eval": True}, "do_eval: true needs data to evaluate on"),
        ("train", {"do_predict": True}, "do_predict: true needs data to evaluate on"),
        ("train", {"use_eaft_loss": True}, "use_eaft_loss: changes the loss"),
        ("train", {"stage": "pt", "use_dft_loss": True}, "use_dft_loss: true works with stage sft only"),
        ("train", {"label_smoothing_factor": 0.1}, "label_smoothing_factor: changes the loss"),
        ("data", {"dataset": None}, "dataset: is not given"),
        ("chat", {"model_name_or_path": None}, "model_name_or_path: is not given"),
        ("chat", {"infer_backend": "vllm"}, "infer_backend: vllm comes with a later version"),
        ("export", {}, "export_dir: is not given"),
    ],
)
def test_load_when_a_verb_lacks_what_it_needs_says_so(verb: Verb, keys: dict[str, Any], expected: str) -> None:
    found = problems_of({**TRAINABLE, **keys}, verb)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_check_when_nothing_is_missing_passes() -> None:
    run = load(TRAINABLE)
    check(run, "train")
    check(run, "data")
    check(run, "chat")


def test_check_when_keys_are_missing_names_all() -> None:
    with pytest.raises(ConfigError) as caught:
        check(load({}), "train")
    assert len(caught.value.problems) == 3


def test_check_when_tokenised_data_exist_needs_no_dataset(tmp_path: Path) -> None:
    check(load({**TRAINABLE, "dataset": None, "tokenized_path": str(tmp_path)}), "train")


def test_load_when_a_key_is_wrong_leaves_out_what_follows_from_it() -> None:
    assert problems_of({"stage": "sfft", "mask_history": True}) == problems_of({"stage": "sfft"})


def test_check_when_fp16_and_no_gpu_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = problems_of({**TRAINABLE, "fp16": True}, "train")
    assert found == (
        "fp16: true needs a GPU, but CUDA_VISIBLE_DEVICES hides them all. "
        "Use fp16: false to compute in fp32; bf16: true is fast only on CPUs with AVX512-BF16 or AMX.",
    )


def test_check_when_fp16_and_a_gpu_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(device, "DRIVER_FILES", ((tmp_path.parent, tmp_path.name),))
    check(load({**TRAINABLE, "fp16": True}), "train")


@pytest.mark.parametrize(("listed", "expected"), [("", False), ("-1", False), ("0", True), ("1,0", True)])
def test_gpu_visible_when_devices_are_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str, expected: bool
) -> None:
    monkeypatch.setattr(device, "DRIVER_FILES", ((tmp_path.parent, tmp_path.name),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert device.gpu_visible() is expected


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_load_when_a_stage_learns_from_rewards_needs_one(stage: str) -> None:
    expected = f"reward_funcs: stage {stage} needs a reward. Give reward_funcs, or reward_model."
    assert expected in problems_of({"stage": stage}, "train")
    for given in ({"reward_funcs": "a:f"}, {"reward_model": "m"}):
        assert expected not in problems_of({"stage": stage, **given}, "train")


def test_load_when_no_layer_but_extra_modules_are_trained_accepts_it() -> None:
    load({"finetuning_type": "freeze", "freeze_trainable_layers": 0, "freeze_extra_modules": "lm_head"})
