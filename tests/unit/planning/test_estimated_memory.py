"""Predicted memory against the engine itself, traced operator by operator on tensors without numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fourfold.config.load import load
from fourfold.planning.job import Job, Recompute
from fourfold.planning.keeps import Keeps
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.planning.states import held_part, optimizer_bytes
from fourfold.training.rehearse import Workload, rehearse
from tiny_models import save_tiny_model

_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("qwen3", {}),
    "gemma": ("gemma3_text", {}),
    "experts": ("qwen3_moe", {"num_experts": 16, "moe_intermediate_size": 256, "num_experts_per_tok": 2}),
    "fused": ("phi3", {}),
    "heads": (  # whose number and size differ by layer
        "gemma4_text",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "sliding_window": 512,
            "global_head_dim": 128,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "biased": ("gpt_oss", {"num_local_experts": 16, "intermediate_size": 256, "num_experts_per_tok": 2}),
}
_TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "bf16": True},
    "pure": {"finetuning_type": "full", "pure_bf16": True},
    "lora": {"bf16": True},
    "qlora": {"bf16": True, "quantization_bit": 4},
    "attention": {"bf16": True, "lora_target": "q_proj,k_proj,v_proj,o_proj"},
    "queries": {"bf16": True, "lora_target": "q_proj,v_proj"},
    "results": {"bf16": True, "lora_target": "o_proj,down_proj"},
}
_CASES: list[tuple[str, str, Layout, Recompute, int, int]] = [
    # model, tuning, layout, recompute, rank of the pipeline, micro-batches
    ("llama", "full", Layout(), "none", 0, 1),
    ("llama", "full", Layout(), "selective", 0, 2),
    ("llama", "lora", Layout(), "none", 0, 1),
    ("llama", "lora", Layout(), "full", 0, 1),
    ("llama", "queries", Layout(), "none", 0, 1),
    ("llama", "results", Layout(), "none", 0, 1),
    ("llama", "full", Layout(dp_shard=8), "full", 0, 2),
    ("llama", "full", Layout(dp_shard=8, zero=1), "none", 0, 2),
    ("llama", "qlora", Layout(tp=2), "none", 0, 1),
    ("llama", "full", Layout(tp=8), "selective", 0, 1),
    ("llama", "full", Layout(cp=4, cp_shards=True), "none", 0, 1),
    ("llama", "lora", Layout(pp=4), "none", 1, 8),
    ("llama", "full", Layout(pp=4), "none", 3, 4),
    ("llama", "full", Layout(dp_shard=2, tp=2, pp=2), "selective", 1, 2),
    ("llama", "full", Layout(pp=4, pp_schedule="interleaved_1f1b"), "none", 0, 8),
    ("llama", "lora", Layout(pp=4, pp_schedule="zbv"), "none", 2, 8),
    ("llama", "full", Layout(pp=2, pp_schedule="zbv"), "none", 1, 3),
    ("tied", "full", Layout(dp_shard=4), "full", 0, 1),
    ("gemma", "full", Layout(), "none", 0, 1),
    ("experts", "full", Layout(dp_shard=8, ep=8), "none", 0, 1),
    ("experts", "lora", Layout(tp=2), "selective", 0, 1),
    ("experts", "attention", Layout(), "none", 0, 1),
    ("biased", "attention", Layout(), "none", 0, 1),
    ("fused", "lora", Layout(tp=2), "none", 0, 1),  # each rank has all heads and channels, and a part of matrices
    ("fused", "full", Layout(tp=4), "selective", 0, 1),
    ("heads", "lora", Layout(tp=2), "none", 0, 1),
]
_MORE: list[tuple[str, str, Layout, Recompute, int, int]] = [
    ("llama", "pure", Layout(), "full", 0, 1),
    ("llama", "lora", Layout(), "selective", 0, 1),
    ("llama", "full", Layout(dp_shard=8), "none", 0, 1),
    ("llama", "lora", Layout(dp_shard=8), "selective", 0, 1),
    ("llama", "qlora", Layout(), "none", 0, 1),
    ("llama", "full", Layout(dp_shard=4, tp=2), "none", 0, 1),
    ("llama", "full", Layout(pp=4), "none", 0, 4),
    ("llama", "full", Layout(pp=2, pp_schedule="zbv"), "none", 0, 4),
    ("llama", "lora", Layout(dp_shard=2, pp=2, pp_schedule="zbv"), "none", 1, 4),
    ("tied", "full", Layout(), "none", 0, 1),
    ("experts", "lora", Layout(), "none", 0, 1),
    ("biased", "lora", Layout(), "none", 0, 1),
    ("heads", "full", Layout(), "none", 0, 1),
]
"""Cases that `make grid` adds."""
_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_model(root / name, family, **_SIZES | more) for name, (family, more) in _MODELS.items()}


@pytest.mark.parametrize(
    ("model", "tuning", "layout", "recompute", "stage", "batches"),
    [*_CASES, *(pytest.param(*case, marks=pytest.mark.grid) for case in _MORE)],
    ids=lambda value: value.describe().replace(" ", "") if isinstance(value, Layout) else str(value),
)
def test_memory_is_what_the_engine_takes(
    model: str,
    tuning: str,
    layout: Layout,
    recompute: Recompute,
    stage: int,
    batches: int,
    folders: dict[str, Path],
) -> None:
    tokens = 2048
    folder = folders[model]
    run = load({"model_name_or_path": str(folder), **_TUNINGS[tuning]})
    shape = read_shape(AutoConfig.from_pretrained(folder))
    job = replace(Job.of(run), sequence=tokens, micro_batch=tokens, sequences_per_step=batches * layout.dp)
    rank = stage * (layout.world_size // layout.pp)
    found = rehearse(run, layout, Workload((tokens,), batches), rank=rank, recompute=recompute)
    part = held_part(shape, job, layout, stage)
    assert found.parameters == part.weights
    assert found.gradients == part.trained * job.master_bytes
    steps = 4 * 1000  # Adam's counters, one a parameter
    assert found.optimizer == pytest.approx(optimizer_bytes(job, part.trained), abs=steps)
    predicted = estimate_memory(shape, job, layout, recompute, tokens, rank=stage)
    assert predicted.allocated == pytest.approx(found.peak.total, rel=_TOLERANCE)


@pytest.mark.parametrize(
    "layout", [pytest.param(Layout(), marks=pytest.mark.grid), Layout(tp=2), Layout(pp=2)], ids=Layout.describe
)
def test_memory_when_parts_of_4_bits_are_unpacked_is_what_the_engine_takes(
    layout: Layout, folders: dict[str, Path]
) -> None:
    run = load({"model_name_or_path": str(folders["llama"]), **_TUNINGS["qlora"]})
    shape = read_shape(AutoConfig.from_pretrained(folders["llama"]))
    job = replace(Job.of(run), sequence=2048, micro_batch=2048, sequences_per_step=2 * layout.dp)
    found = rehearse(run, layout, Workload((2048,), 2), unpacked=True)
    kept = Keeps(unpacked=True).job(job)
    assert found.parameters == held_part(shape, kept, layout, 0).weights
    predicted = estimate_memory(shape, kept, layout, "none", 2048, rank=0)
    assert predicted.allocated == pytest.approx(found.peak.total, rel=_TOLERANCE)


@pytest.mark.parametrize("spared", [1, 3])
@pytest.mark.parametrize(
    ("model", "tuning", "layout", "recompute"),
    [
        ("llama", "full", Layout(), "full"),
        ("llama", "lora", Layout(dp_shard=4), "selective"),
        ("llama", "full", Layout(dp_shard=4), "full"),
        ("qwen3_moe", "full", Layout(), "full"),
    ],
    ids=lambda value: value.describe().replace(" ", "") if isinstance(value, Layout) else str(value),
)
def test_memory_when_some_layers_are_not_computed_again_is_what_the_engine_takes(
    model: str, tuning: str, layout: Layout, recompute: Recompute, spared: int, tmp_path: Path
) -> None:
    tokens = 2048
    folder = save_tiny_model(tmp_path / model, model, **_SIZES | {"num_hidden_layers": 5})
    run = load({"model_name_or_path": str(folder), **_TUNINGS[tuning]})
    job = replace(Job.of(run), sequence=tokens, micro_batch=tokens, sequences_per_step=layout.dp, spared=spared)
    found = rehearse(run, layout, Workload((tokens,)), recompute=recompute, spared=spared)
    shape = read_shape(AutoConfig.from_pretrained(folder))
    predicted = estimate_memory(shape, job, layout, recompute, tokens)
    assert predicted.allocated == pytest.approx(found.peak.total, rel=_TOLERANCE)
