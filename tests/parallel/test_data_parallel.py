"""DDP, ZeRO 1 to 3 and HSDP train as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import Case, Curve, alone, assert_same, make_model, run_ranks, under

from fourfold.models.unwrap import base_model
from fourfold.parallel.gradients import replicate
from fourfold.planning.layout import Layout

LAYOUTS = {
    "ddp2": Layout(dp_replicate=2),
    "ddp4": Layout(dp_replicate=4),
    "zero1-2": Layout(dp_shard=2, zero=1),
    "zero2-2": Layout(dp_shard=2, zero=2),
    "zero3-2": Layout(dp_shard=2, zero=3),
    "zero1-4": Layout(dp_shard=4, zero=1),
    "zero2-4": Layout(dp_shard=4, zero=2),
    "zero3-4": Layout(dp_shard=4, zero=3),
    "hsdp2x2": Layout(dp_replicate=2, dp_shard=2),
}
CASES = {
    "llama-full": Case(),
    "llama-lora-padded": Case(tuning="lora", packed=False),
    "qwen3-full-tied": Case(family="qwen3"),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_training_when_split_equals_one_process(layout: str, case: str, references: dict[str, Curve]) -> None:
    for curve in under(CASES[case], LAYOUTS[layout]):
        assert_same(curve, references[case])


def test_exchange_when_ddp_trains_adapters_sends_these_alone() -> None:
    for sent, trained in run_ranks(2, _bytes_sent_by_ddp):
        assert sent == trained


def _bytes_sent_by_ddp() -> tuple[int, int]:
    """Bytes that a step of LoRA hands to the exchange of gradients, and bytes of the adapters."""
    module = make_model(Case(tuning="lora"))
    wrapped = replicate(base_model(module), dist.group.WORLD)
    sent, exchange = 0, dist.all_reduce

    def count(tensor: torch.Tensor, **kwargs: object) -> object:
        nonlocal sent
        sent += tensor.nbytes
        return exchange(tensor, **kwargs)

    dist.all_reduce = count
    wrapped(input_ids=torch.arange(8)[None]).logits.sum().backward()
    return sent, sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def test_bytes_when_sharded_are_a_share_on_each_rank() -> None:
    whole = alone(Case())
    for world, layout in ((2, Layout(dp_shard=2)), (4, Layout(dp_shard=4, zero=1))):
        curves = under(Case(), layout)
        assert sum(curve.local_numel for curve in curves) == whole.local_numel
        assert sum(curve.state_numel for curve in curves) == whole.state_numel == 2 * whole.local_numel
        assert max(curve.local_numel for curve in curves) <= 1.1 * whole.local_numel / world
