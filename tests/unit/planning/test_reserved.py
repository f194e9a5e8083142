"""Where FSDP's shards of gradients lie, and what the allocator reserves for it."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from fourfold.planning.estimate import Memory
from fourfold.planning.hardware import find_device
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.planning.reserved import gradients_may_join
from rehearsed import MODELS

GIB = 1 << 30


def _memory(layout: Layout, recompute: Recompute, tuning: str = "full", batches: int = 1) -> Memory:
    shape = read_shape(AutoConfig.from_pretrained(MODELS / "Llama-3-8B"))
    job = Job(tuning=tuning, sequence=4096, sequences_per_step=batches * layout.dp)  # type: ignore[arg-type]
    return estimate_memory(shape, job, layout, recompute, 4096, device=find_device("h100"))


@pytest.mark.parametrize(
    ("shards", "root", "may"),
    [(4 * GIB, 4 * GIB, True), (2 * GIB, 4 * GIB, True), (2 * GIB - 1, 4 * GIB, False), (GIB // 8, 0, False)],
)
def test_gradients_when_they_are_few_beside_the_largest_block_stay_apart(shards: int, root: int, may: bool) -> None:
    assert gradients_may_join(shards, root) == may


@pytest.mark.parametrize(
    ("layout", "tuning", "joins"),
    [
        (Layout(dp_shard=4), "full", True),
        (Layout(dp_shard=2, tp=2), "full", True),
        (Layout(dp_shard=64), "full", False),
        (Layout(dp_shard=4), "lora", False),
        (Layout(dp_replicate=4), "full", False),
    ],
)
def test_gradients_when_activations_leave_room_join_them(layout: Layout, tuning: str, joins: bool) -> None:
    assert _memory(layout, "none", tuning).joins_gradients == joins


def test_gradients_when_activations_of_a_second_micro_batch_come_after_them_stay_apart() -> None:
    assert not _memory(Layout(dp_shard=4), "none", batches=2).joins_gradients


def test_reserved_when_gradients_join_has_no_share_of_them_beside_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    together = _memory(Layout(dp_shard=4), "none")
    monkeypatch.setattr("fourfold.planning.memory.gradients_may_join", lambda shards, root: False)
    apart = _memory(Layout(dp_shard=4), "none")
    assert not apart.joins_gradients
    assert apart.allocated == together.allocated
    shards = 8_030_261_248 * 4 // 4
    assert 0.9 * shards <= apart.reserved - together.reserved <= shards


def test_gradients_when_the_device_is_not_known_are_not_asked_about() -> None:
    shape = read_shape(AutoConfig.from_pretrained(MODELS / "Llama-3-8B"))
    found = estimate_memory(shape, Job(tuning="full", sequence=4096), Layout(dp_shard=4), "none", 4096)
    assert not found.joins_gradients
