"""`memory: low` as the planner sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fourfold.config.load import load
from fourfold.planning.estimate import Memory
from fourfold.planning.hardware import build_cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.shape import ModelShape

_DEVICE = build_cluster("h100").device


def _memory(shape: ModelShape, layout: Layout | None = None, **keys: Any) -> Memory:
    given = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "cutoff_len": 512, "bf16": True, **keys}
    job = Job.of(load(given))
    return estimate_memory(shape, job, layout or Layout(), "full", 1024, device=_DEVICE)


def test_memory_when_low_is_without_the_embedding_and_with_small_logits(shape_of: Callable[[str], ModelShape]) -> None:
    shape = shape_of("Llama-3-8B")
    keys = {"finetuning_type": "lora", "quantization_bit": 4}
    plain, low = _memory(shape, **keys), _memory(shape, **keys, memory="low")
    assert plain.terms["parameters"] - low.terms["parameters"] == 128256 * 4096 * 2
    assert low.terms["logits"] < plain.terms["logits"] / 3
    assert low.allocated < 5.5 * 2**30  # 6.1 GiB is the least that another tool was measured to need


def test_memory_when_the_embedding_is_trained_tied_or_split_keeps_it(shape_of: Callable[[str], ModelShape]) -> None:
    untied, tied = shape_of("Llama-3-8B"), shape_of("Llama-3.2-1B")
    lora: dict[str, Any] = {"finetuning_type": "lora"}
    cases: list[tuple[ModelShape, Layout, dict[str, Any]]] = [
        (untied, Layout(), {"finetuning_type": "full"}),
        (tied, Layout(), lora),
        (untied, Layout(dp_shard=2), lora),
    ]
    for shape, layout, keys in cases:
        plain, low = _memory(shape, layout, **keys), _memory(shape, layout, **keys, memory="low")
        assert plain.terms["parameters"] == low.terms["parameters"]
