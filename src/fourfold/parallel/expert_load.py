"""How evenly the router spreads tokens over experts: counted where they are called, added up over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.expert import count_choices, find_experts, takes_choices


class ExpertLoad:
    """Counts, for every layer, how many (token, choice) pairs each expert gets in the micro-batches of a step.

    Only what is trained on is counted, once: not padding, and not what the backward pass computes again.
    """

    def __init__(self, root: nn.Module) -> None:
        """Watch the experts of a model; before it is cut, so that all ranks number its layers alike.

        The layers themselves are not kept: a pipeline frees those of other ranks.
        """
        layers = [experts for _, experts in find_experts(root) if takes_choices(experts)]
        self._sizes = [int(experts.num_experts) for experts in layers]  # type: ignore[arg-type] - an int
        self._counts: list[Tensor | None] = [None] * len(layers)
        self._counted: Tensor | None = None
        for number, experts in enumerate(layers):
            experts.register_forward_pre_hook(self._counter(number), with_kwargs=True)

    @property
    def watches(self) -> bool:
        """Whether there are experts."""
        return bool(self._sizes)

    @contextmanager
    def watch(self, counted: Tensor) -> Iterator[None]:
        """Count in the forward passes within; `counted` [B, S] bool is False for positions that only fill rows up."""
        self._counted = counted.reshape(-1, 1) if torch.is_grad_enabled() else None
        try:
            yield
        finally:
            self._counted = None

    def _counter(self, number: int) -> Any:
        def count(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._counted is None:
                return
            # the second argument of every family's experts, though not under one name
            size, indices = self._sizes[number], [*args, *kwargs.values()][1]
            found = count_choices(torch.where(self._counted, indices, size), size)
            before = self._counts[number]
            self._counts[number] = found if before is None else before + found

        return count

    def figures(self) -> dict[str, float]:
        """The spread since the last call, over all ranks of the job, which must all call; empty without experts.

        Returns:
            expert_max_share: the largest share of a layer's pairs that one expert got; 1 / experts is even.
            expert_load_cv: standard deviation of the experts' loads over their mean, averaged over layers; 0 is even.
        """
        if not self._sizes:
            return {}
        found = torch.zeros(len(self._sizes), max(self._sizes), dtype=torch.float64)
        for row, size, counts in zip(found, self._sizes, self._counts, strict=True):
            if counts is not None:
                row[:size] = counts.cpu()
        self._counts = [None] * len(self._sizes)
        if dist.is_initialized():
            dist.all_reduce(found)  # layers of other pipeline stages are 0 here; tensor-parallel ranks count alike
        shares = [row[:size] / row.sum().clamp(min=1) for row, size in zip(found, self._sizes, strict=True)]
        spread = [share.std(correction=0) * len(share) for share in shares]
        return {
            "expert_max_share": float(torch.stack([share.max() for share in shares]).max()),
            "expert_load_cv": float(torch.stack(spread).mean()),
        }
