"""Tokens on their way to experts of other ranks, and results on their way back.

Each (token, choice) pair is a row. A rank sorts its rows by expert, so that those for each rank lie together, and they
are sent (one all-to-all). What arrives lies by sender; it is put in the order of experts, multiplied, put back, and
sent home (a second all-to-all), where a token's results are weighted and added up. All orders are kept with their
inverses, so that every gradient is read from where it lies (see `expert_rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.base.triton import has_triton
from fourfold.parallel.expert_rows import combine, count_choices, sort_choices, spread
from fourfold.parallel.local_experts import run_rows, takes_rows
from fourfold.parallel.sums import on_host

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""tokens [N, H], expert of each [N, K], weight of each [N, K] -> [N, H]: the forward pass of Transformers' experts."""
Sizes = tuple[list[int], list[int]]
"""How many rows go to each rank, and come from it."""


class Dispatch:
    """Stands in for the forward pass of a layer's experts: sends tokens to their experts' ranks and results back.

    The order of experts is that of the ranks: rank r of the group holds experts [r * count, (r + 1) * count).
    """

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup, count: int) -> None:
        """Take the experts, before their forward pass is replaced, the ranks that share them, and how many are here."""
        self._experts, self._group, self._count = experts, group, count
        self._run: Run = experts.forward

    def __call__(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The experts' weighted outputs for this rank's tokens.

        Args:
            hidden_states: [T, H].
            indices: the experts of each token among all, [T, K]; a number beyond them stands for none.
            weights: [T, K].
        Returns:
            [T, H], in the dtype of `hidden_states`.
        """
        experts = self._count * dist.get_world_size(self._group)
        arrived, sizes = self._ask(count_choices(indices, experts), indices.numel())
        # all that can be done before the wait
        _, order, inverse = sort_choices(indices)  # choices of none come last
        rows = spread(hidden_states, order, inverse)
        to, come = sizes()
        skipped = len(rows) - sum(to)
        tokens = _Exchange.apply(rows[: len(rows) - skipped] if skipped else rows, to, come, self._group)
        back = _Exchange.apply(self._compute(tokens, arrived), come, to, self._group)
        back = F.pad(back, (0, 0, 0, skipped)) if skipped else back
        return combine(back, weights, order, inverse, hidden_states.dtype)

    def _ask(self, sent: Tensor, choices: int) -> tuple[Tensor, Callable[[], Sizes]]:
        """Tell the other ranks what will be sent to them.

        Args:
            sent: how many rows go to each expert of all ranks, [ranks E].
            choices: how many rows there are at most.
        Returns:
            how many rows come from each rank for each expert here, [ranks, E] int32; and what waits for the sizes to be
            on the host, the one wait for the device in a layer.
        """
        both = torch.stack([sent, sent]).view(2, dist.get_world_size(self._group), -1)
        dist.all_to_all_single(both[1], both[0], group=self._group)
        read = on_host(both)

        def wait() -> Sizes:
            to, come = read().sum(2, dtype=torch.long).tolist()
            return to, come

        return both[1].int(), wait

    def _compute(self, tokens: Tensor, arrived: Tensor) -> Tensor:
        """This rank's experts on what has arrived, tokens [N, H] -> [N, H]; weights are applied by the sender."""
        if not len(tokens):
            # One row of zeros, thrown away again: the backward pass must reach every collective on every rank.
            one = torch.zeros(1, 1, dtype=torch.long, device=tokens.device)
            return self._run(F.pad(tokens, (0, 0, 0, 1)), one, torch.ones_like(one, dtype=tokens.dtype))[:0]
        if not takes_rows(self._experts):
            numbers = torch.arange(self._count, device=tokens.device).repeat(len(arrived))
            experts = numbers.repeat_interleave(arrived.reshape(-1), output_size=len(tokens)).unsqueeze(1)
            return self._run(tokens, experts, torch.ones_like(experts, dtype=tokens.dtype))
        by_expert, by_sender, ends = regroup(arrived, len(tokens))
        rows = _Reorder.apply(tokens, by_expert, by_sender)
        return _Reorder.apply(run_rows(self._experts, rows, ends), by_sender, by_expert)  # type: ignore[return-value]


def regroup(arrived: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The orders of what has arrived.

    Args:
        arrived: how many rows came from each rank for each expert here, [ranks, E] int32; they lie in this order.
        rows: how many in all.
    Returns:
        by_expert: for each row in the order of experts, which of those that arrived it is, [rows] int64.
        by_sender: the inverse.
        ends: where the rows of each expert end, [E] int32.
    """
    if arrived.device.type == "cuda" and has_triton():
        from fourfold.parallel import rows_kernel

        return rows_kernel.regroup(arrived.contiguous(), rows)
    of_senders, of_experts = arrived.reshape(-1), arrived.t().reshape(-1)
    starts = (of_senders.cumsum(0) - of_senders).view_as(arrived)
    starts_by_expert = (of_experts.cumsum(0) - of_experts).view(arrived.t().shape)
    shift = starts - starts_by_expert.t()
    place = torch.arange(rows, device=arrived.device)
    by_expert = place + shift.t().reshape(-1).repeat_interleave(of_experts, output_size=rows)
    by_sender = place - shift.reshape(-1).repeat_interleave(of_senders, output_size=rows)
    return by_expert, by_sender, arrived.sum(0).cumsum(0, dtype=torch.int32)


class _Reorder(torch.autograd.Function):
    """Rows in another order, whose gradient is read by the inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """rows [N, H], order [N], inverse [N] -> [N, H]."""
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [N, H]."""
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows, whose gradient is the all-to-all back."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """Rows [sum(sent), H], those for the first rank first -> [sum(received), H], those of the first rank first."""
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Each row's gradient to the rank that sent it."""
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found
