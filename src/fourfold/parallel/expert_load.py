"""How evenly the router spreads tokens over experts: counted where they are called, added up over all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.expert_rows import count_choices
from fourfold.parallel.stacked_experts import find_experts, takes_choices
from fourfold.parallel.sums import on_host


class _Counter:
    """Counts the choices of one layer, in a tensor that stays where it is, so that a compiled layer has it counted.

    Attributes:
        size: number of experts.
        counted: [T, 1] bool, positions that count; None while none do.
        total: [size] int64; None until something was counted.
        chosen: [T, K], choices that are still to be counted, with those of other layers; None for none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.counted: Tensor | None = None
        self.total: Tensor | None = None
        self.chosen: Tensor | None = None

    def __call__(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.counted is None or self.total is None:
            return
        # the second argument of every family's experts, though not under one name
        indices = [*args, *kwargs.values()][1].detach()
        if torch.compiler.is_compiling():
            chosen = torch.where(self.counted, indices, self.size)
            self.total.add_(count_choices(chosen, self.size).long())
        else:
            self.chosen = indices


def _count(counters: Sequence[_Counter], counted: Tensor) -> None:
    """Count what layers of one size have chosen, all at once: the host has little time where layers wait for ranks."""
    size, chosen, totals = counters[0].size, [], []
    for counter in counters:
        assert counter.chosen is not None
        assert counter.total is not None
        chosen.append(counter.chosen)
        totals.append(counter.total)
        counter.chosen = None
    first = torch.arange(len(chosen), device=counted.device).view(-1, 1, 1) * size  # of the layers' experts, in a row
    together = torch.stack(chosen)
    together = torch.where(counted & (together < size), together + first, len(chosen) * size)
    found = count_choices(together, len(chosen) * size).long().split(size)
    torch._foreach_add_(totals, found)  # pyright: ignore[reportPrivateImportUsage]


class ExpertLoad:
    """Counts, for every layer, how many (token, choice) pairs each expert gets in the micro-batches of a step.

    Only what is trained on is counted, once: not padding, and not what the backward pass computes again.
    """

    def __init__(self, root: nn.Module, *, is_shared: bool = True) -> None:
        """Watch the experts of a model; before it is cut, so that all ranks number its layers alike.

        The layers themselves are not kept: a pipeline frees those of other ranks.

        Args:
            is_shared: the job's other ranks train it as well.
        """
        self._is_shared = is_shared
        layers = [experts for _, experts in find_experts(root) if takes_choices(experts)]
        self._counters = [_Counter(int(experts.num_experts)) for experts in layers]  # type: ignore[arg-type] - an int
        for experts, counter in zip(layers, self._counters, strict=True):
            # behind them, where the host is ahead of the device if they wait for other ranks
            experts.register_forward_hook(counter, with_kwargs=True)

    @property
    def watches(self) -> bool:
        """Whether there are experts."""
        return bool(self._counters)

    @contextmanager
    def watch(self, counted: Tensor) -> Iterator[None]:
        """Count in the forward passes within; `counted` [B, S] bool is False for positions that only fill rows up."""
        if not torch.is_grad_enabled():
            yield
            return
        for counter in self._counters:
            counter.counted = counted.reshape(-1, 1)
            if counter.total is None:
                counter.total = torch.zeros(counter.size, dtype=torch.long, device=counted.device)
        try:
            yield
        finally:
            sizes: dict[tuple[int, torch.Size], list[_Counter]] = defaultdict(list)
            for counter in self._counters:
                counter.counted = None
                if counter.chosen is not None:
                    sizes[counter.size, counter.chosen.shape].append(counter)
            for counters in sizes.values():
                _count(counters, counted.reshape(-1, 1))

    def figures(self) -> Callable[[], dict[str, float]]:
        """The spread since the last call, over all ranks of the job, which must all read it; empty without experts.

        Returns:
            what waits for the device's work of before this call (`sums.on_host`), and tells:
            expert_max_share: the largest share of a layer's pairs that one expert got; 1 / experts is even.
            expert_load_cv: standard deviation of the experts' loads over their mean, averaged over layers; 0 is even.
        """
        if not self._counters:
            return dict
        sizes = [counter.size for counter in self._counters]
        totals = [counter.total for counter in self._counters if counter.total is not None]  # all, or none as yet
        read = on_host(torch.cat(totals) if totals else torch.zeros(sum(sizes)))
        for total in totals:
            total.zero_()
        return lambda: _spread(read().split(sizes), is_shared=self._is_shared and dist.is_initialized())


def _spread(counted: Sequence[Tensor], *, is_shared: bool) -> dict[str, float]:
    """See `ExpertLoad.figures`; counts of each layer's experts on this rank, on the host."""
    sizes = list(map(len, counted))
    found = torch.zeros(len(sizes), max(sizes), dtype=torch.float64)
    for row, counts in zip(found, counted, strict=True):
        row[: len(counts)] = counts
    if is_shared:
        dist.all_reduce(found)  # layers of other pipeline stages are 0 here; tensor-parallel ranks count alike
    shares = [row[:size] / row.sum().clamp(min=1) for row, size in zip(found, sizes, strict=True)]
    spread = [share.std(correction=0) * len(share) for share in shares]
    return {
        "expert_max_share": float(torch.stack([share.max() for share in shares]).max()),
        "expert_load_cv": float(torch.stack(spread).mean()),
    }
