"""Memory and time of what compiled layers keep or leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fourfold.planning.cost import estimate_cost
from fourfold.planning.hardware import build_cluster, find_device
from fourfold.planning.job import Job
from fourfold.planning.keeps import may_keep_copies
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import ModelShape
from tiny_models import tiny_config

_FULL = Job(tuning="full", sequence=4096, sequences_per_step=4, engine="compiled", keeps_logits=True)
_LORA = Job(tuning="lora", sequence=4096, sequences_per_step=2, engine="compiled")
_H100 = find_device("h100-80g-sxm")


def _bytes(shape: ModelShape, job: Job, tokens: int = 8192) -> dict[str, int]:
    return estimate_memory(shape, job, Layout(), "none", tokens, device=_H100).terms


def _linear(shape: ModelShape) -> int:
    return sum(weight.numel for layer in shape.layers for weight in layer.weights if weight.linear)


def test_memory_when_copies_are_kept_has_two_bytes_more_for_each_number_of_a_layers_products(
    shape_of: Callable[[str], ModelShape],
) -> None:
    shape = shape_of("Llama-3.2-3B")
    plain, kept = _bytes(shape, _FULL), _bytes(shape, replace(_FULL, keeps_copies=True))
    assert kept["parameters"] - plain["parameters"] == 2 * _linear(shape)


def test_time_when_copies_are_kept_is_that_of_fewer_casts(shape_of: Callable[[str], ModelShape]) -> None:
    shape, cluster = shape_of("Llama-3.2-3B"), build_cluster(_H100)
    plain, kept = (
        estimate_cost(shape, job, Layout(), cluster, "none", 8192).step_s
        for job in (_FULL, replace(_FULL, keeps_copies=True))
    )
    assert 0.02 < plain - kept < 0.03  # 24.4 ms of casts in two micro-batches, less 2 of writing copies (H100)


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"tuning": "lora"}, Layout()),
        ({"engine": "eager"}, Layout()),
        ({"float8": True}, Layout()),
        ({"optim": "muon"}, Layout()),
        ({"master": "bf16"}, Layout()),
        ({"host_embedding": True}, Layout()),
        ({}, Layout(dp_shard=2)),
        ({}, Layout(tp=2)),
    ],
)
def test_copies_when_nobody_would_read_or_write_them_are_not_kept(changes: dict[str, object], layout: Layout) -> None:
    assert may_keep_copies(_FULL, Layout())
    assert may_keep_copies(_FULL, Layout(dp_replicate=2))
    assert not may_keep_copies(replace(_FULL, **changes), layout)  # type: ignore[arg-type]


def test_memory_when_a_head_changes_its_logits_has_them_twice_at_most(shape_of: Callable[[str], ModelShape]) -> None:
    shape = shape_of("Llama-3.2-3B")
    own, scaled, capped = (_bytes(replace(shape, changed_logits=n), _FULL)["logits"] for n in range(3))
    assert own == 2 * 8192 * shape.vocab
    assert (scaled, capped) == (2 * own, 4 * own)
    longer = _bytes(replace(shape, changed_logits=1), _FULL, 16_384)["logits"]
    assert longer == 3 * own  # all of them kept, and a part made anew


_JOINED = ((6144, 4096, 3), (4096, 4096, 1), (28_672, 4096, 2), (4096, 14_336, 1))
"""Rows, columns and adapters of a layer's products, those of one input as one."""
_ALONE = ((4096, 4096, 1), (1024, 4096, 1))


@pytest.mark.parametrize(
    ("changes", "layout", "products"),
    [
        ({}, Layout(), _JOINED),
        ({"lora_rank": 64}, Layout(), _JOINED),
        ({"engine": "eager"}, Layout(), ()),
        ({"bits": 4}, Layout(), ()),
        ({"lora_targets": ("q_proj", "v_proj")}, Layout(), _ALONE),
        ({}, Layout(dp_shard=2), ()),
    ],
)
def test_memory_when_layers_are_compiled_has_room_for_low_rank_terms(
    changes: dict[str, object],
    layout: Layout,
    products: tuple[tuple[int, int, int], ...],
    shape_of: Callable[[str], ModelShape],
) -> None:
    shape = shape_of("Llama-3-8B")
    job = replace(_LORA, **changes)  # type: ignore[arg-type]
    eager = replace(job, engine="eager")
    with_room, without = (
        estimate_memory(shape, each, layout, "none", 4096, device=_H100).terms["parameters"] for each in (job, eager)
    )
    room = 0
    for rows, columns, adapters in products:
        more = -(-adapters * job.lora_rank // 32) * 32
        room += (rows + more) * (columns + more) - rows * columns
    assert with_room - without == 2 * 32 * room


@pytest.mark.parametrize(("family", "times"), [("llama", 0), ("granite", 1), ("gemma2", 2)])
def test_shape_when_it_is_read_knows_how_a_head_changes_its_logits(family: str, times: int) -> None:
    assert read_shape(tiny_config(family)).changed_logits == times
