"""What FSDP scatters gradients by where their shards lie with all else gives what PyTorch's own gives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import run_ranks

from fourfold.parallel.fsdp import ReduceScatter


def test_gradients_when_scattered_are_the_sums_of_each_ranks_part() -> None:
    def work() -> list[float]:
        rank, own = dist.get_rank(), torch.zeros(2)
        whole = torch.arange(4.0) + 10 * rank
        group = dist.group.WORLD
        assert group is not None
        ReduceScatter()(output_tensor=own, input_tensor=whole, group=group, op=dist.ReduceOp.SUM)
        return own.tolist()

    assert run_ranks(2, work) == [[10.0, 12.0], [14.0, 16.0]]
