"""Other tools' keys and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fourfold.base.errors import ConfigError
from fourfold.config.key import Status
from fourfold.config.load import load
from fourfold.config.schema import table


def changed(keys: dict[str, Any]) -> dict[str, Any]:
    """What the keys change against a run without them, nested keys as `parallel.tp`."""

    def flat(source: dict[str, Any]) -> dict[str, Any]:
        values = load({"do_train": False, **source}).flat()
        nested = values.pop("parallel")
        return values | {f"parallel.{name}": value for name, value in nested.items()}

    plain = flat({})
    return {name: value for name, value in flat(keys).items() if value != plain[name]}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"use_liger_kernel": True}, {"enable_liger_kernel": True}),
        ({"use_v1_kernels": True}, {"enable_liger_kernel": True}),
        ({"activation_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"use_unsloth_gc": True}, {"gradient_checkpointing": True}),
        ({"evaluation_strategy": "epoch", "do_eval": True}, {"eval_strategy": "epoch", "do_eval": True}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"generation_max_length": 64}, {"max_length": 64}),
        ({"generation_config": {"top_k": 5, "pad_token_id": 0}}, {"top_k": 5}),
        ({"train_sampling_strategy": "sequential"}, {"disable_shuffling": True}),
        ({"beta": 0.04}, {"kl_weight": 0.04, "pref_beta": 0.04}),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, {"clip_low": 0.1, "clip_high": 0.3}),
        ({"loss_type": "dapo"}, {"grpo_variant": "dapo", "clip_high": 0.28}),
        ({"loss_type": "dr_grpo"}, {"grpo_variant": "dr_grpo", "scale_rewards": "none"}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"grpo_variant": "gspo"}),
        ({"loss_type": "sppo_hard"}, {"pref_loss": "sppo"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"max_completion_length": 64}, {"max_new_tokens": 64}),
        ({"use_muon": True}, {"optim": "muon"}),
        ({"use_adam_mini": True}, {"optim": "adamw_8bit"}),
        ({"optim": "adamw_torch_fused"}, {}),
        ({"optim": "paged_adamw_8bit"}, {"optim": "adamw_8bit"}),
        ({"fsdp": "full_shard auto_wrap"}, {"strategy": "fsdp"}),
        ({"fsdp": ["shard_grad_op", "offload"]}, {"strategy": "zero2", "parallel.offload": "params"}),
        ({"fsdp": True}, {"strategy": "fsdp"}),
        ({"fsdp": "hybrid_shard_zero2"}, {"strategy": "hsdp", "parallel.reshard_after_forward": False}),
        (
            {"fsdp": "full_shard", "fsdp_config": {"fsdp_offload_params": True, "activation_checkpointing": True}},
            {"strategy": "fsdp", "parallel.offload": "params", "gradient_checkpointing": True},
        ),
        ({"parallelism_config": {"tp_size": 2, "cp_size": 1}}, {"parallel.tp": 2}),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "sequence_parallel": True},
            {"parallel.tp": 2, "parallel.pp": 4, "parallel.sequence_parallel": True},
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, {"parallel.pp_schedule": "interleaved_1f1b"}),
        ({"recompute_granularity": "full"}, {"parallel.recompute": "full"}),
        ({"use_distributed_optimizer": True}, {"strategy": "zero1"}),
        ({"mixed_precision": "bf16_mixed"}, {"bf16": True}),
    ],
)
def test_load_when_another_tools_key_is_given_maps_and_notes_it(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    assert changed(keys) == expected
    notes = load(keys).notes
    assert all(any(note.startswith(f"{name}: ") for note in notes) for name in keys if name != "do_eval")


ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"zero_optimization": {"stage": 0}}, {"strategy": "ddp"}),
        ({"zero_optimization": {"stage": 1}}, {"strategy": "zero1"}),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, {"strategy": "zero2", "bf16": True}),
        (ZERO3, {"strategy": "zero3", "parallel.offload": "params"}),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}},
            {"strategy": "zero2", "parallel.offload": "optimizer", "parallel.offload_folder": "/disk"},
        ),
        (
            {"tensor_parallel": {"autotp_size": 4}, "zero_optimization": {"stage": 1}},
            {"parallel.tp": 4, "strategy": "zero1"},
        ),
        (
            {
                "train_batch_size": 32,
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 0.5,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": "auto"}},
                "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "warmup_min_lr": 0}},
            },
            {
                "strategy": "ddp",
                "global_batch_size": 32,
                "max_grad_norm": 0.5,
                "learning_rate": 1e-4,
                "adam_beta2": 0.95,
                "warmup_steps": 10,
            },
        ),
    ],
)
def test_load_when_deepspeed_file_is_named_maps_it(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert changed({"deepspeed": str(path)}) == expected
    assert changed({"deepspeed": config}) == expected


def test_load_when_deepspeed_has_more_than_is_mapped_names_what_is_left() -> None:
    notes = load({"deepspeed": ZERO3}).notes
    assert any("left to Fourfold's own engine: zero_allow_untested_optimizer, zero_optimization.overlap_comm" in note
               for note in notes)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"distributed_type": "FSDP", "mixed_precision": "bf16", "num_processes": 8, "num_machines": 2,
             "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD", "fsdp_version": 2}},
            {"strategy": "hsdp", "bf16": True, "nproc": 4},
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True}},
            {"strategy": "fsdp", "parallel.reshard_after_forward": True},
        ),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2}, {"strategy": "ddp", "nproc": 2}),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}},
            {"strategy": "zero3", "parallel.offload": "params"},
        ),
        ({"distributed_type": "NO", "parallelism_config": {"parallelism_config_tp_size": 2}}, {"parallel.tp": 2}),
    ],
)  # fmt: skip
def test_load_when_accelerate_file_is_named_maps_it(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert changed({"accelerate_config": str(path)}) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"deepspeed": "no.json"},
            "deepspeed: no.json cannot be read (No such file or directory). Check the path; it is taken from "
            f"{Path.cwd()}.",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "deepspeed: zero_optimization.stage: 4 is not known"),
        ({"deepspeed": {"optimizer": {"type": "Lamb"}}}, "deepspeed: optimizer.type: 'Lamb' is not known"),
        ({"fsdp": "fully_shard"}, "fsdp: 'fully_shard' is not known. Use full_shard"),
        ({"fsdp": "full_shard", "strategy": "ddp"}, "fsdp: 'full_shard' means strategy: 'fsdp', but strategy is 'ddp'"),
        ({"tensor_model_parallel_size": 2, "parallel.tp": 4}, "tensor_model_parallel_size: 2 means parallel.tp: 2"),
        ({"mixed_precision": "int3"}, "mixed_precision: 'int3' is not known"),
        ({"generation_config": "no.json"}, "generation_config: no.json cannot be read"),
    ],
)
def test_load_when_a_value_has_no_counterpart_says_so(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(keys)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(expected)


def another_value(default: Any, kind: frozenset[Any]) -> Any:
    """A valid value of a key that is not its default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return 1 if kind == {int} else "x: 1" if dict in kind else "x"


@pytest.mark.parametrize("name", [name for name, key in table().items() if key.spec.status is Status.REFUSED])
def test_load_when_a_refused_key_asks_for_something_says_what_to_use(name: str) -> None:
    key = table()[name]
    with pytest.raises(ConfigError) as caught:
        load({name: another_value(key.default, key.kind.types)})
    assert caught.value.problems[0].startswith(f"{name}: ")
    assert caught.value.problems[0].endswith(f"is refused. {key.spec.note}")


def test_load_when_a_settled_key_is_given_notes_why_it_changes_nothing() -> None:
    assert load({"low_cpu_mem_usage": False}).notes == (
        "low_cpu_mem_usage: false changes nothing; weights are always streamed to their device",
    )


def test_load_when_a_secret_is_mapped_does_not_show_it() -> None:
    run = load({"hub_token": "abc"})
    assert run.model.hf_hub_token == "abc"
    assert run.notes == ("hub_token: (hidden) is taken for hf_hub_token: (hidden)",)
