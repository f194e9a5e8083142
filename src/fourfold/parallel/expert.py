"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them and back.

Nothing of a model's own code is replaced but the way into its experts. The router chooses among all experts as ever;
each (token, expert) pair is sent to the rank that holds the expert (one all-to-all), the experts' own forward pass runs
there on what has arrived, and the results are sent back (a second all-to-all) and weighted where the token lives. The
backward pass goes the same way in reverse, so the gradient of an expert is complete on the rank that holds it: it has
seen the tokens of the whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.base.errors import PlanError
from fourfold.base.peft import ParamWrapper
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.shares import Cut, Share, Shares

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""tokens [N, H], expert of each [N, K], weight of each [N, K] -> [N, H]: the forward pass of Transformers' experts."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts: 3-D parameters with as many entries as it says it has experts."""
    count = getattr(module, "num_experts", None)
    return any(p.ndim == 3 and len(p) == count for p in module.parameters(recurse=False))


def takes_choices(experts: nn.Module) -> bool:
    """Whether experts are called by Transformers' interface for them: tokens, the experts of each, their weights."""
    # Its decorator leaves what it knows about their matrices as attributes.
    return "is_transposed" in vars(experts)


def find_experts(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts of each layer that has them, by name, in order."""
    return ((name, module) for name, module in root.named_modules() if is_experts(module))


def has_experts(root: nn.Module) -> bool:
    """Whether some layer has stacked experts."""
    return next(find_experts(root), None) is not None


def _count(experts: nn.Module) -> int:
    return next(len(p) for p in experts.parameters(recurse=False) if p.ndim == 3)


def split_experts(root: nn.Module, mesh: Mesh, shares: Shares) -> list[nn.Module]:
    """Leave this rank its part of every layer's experts, in place, and route tokens between the ranks.

    Args:
        root: the model, adapters included.
        mesh: with `ep` larger than 1.
        shares: where the parts are noted.
    Returns:
        what FSDP must shard apart from the layers: the experts of each layer, with the adapters around them.
    """
    assert mesh.expert_mesh is not None, "a mesh without expert parallelism"
    group, index = mesh.expert_mesh.get_group("ep"), mesh.expert_mesh.get_local_rank("ep")
    apart: list[nn.Module] = []
    for _, experts in list(find_experts(root)):
        part = _Part.of(experts, index, mesh.layout.ep)
        wrappers = [m for m in root.modules() if isinstance(m, ParamWrapper) and m.get_base_layer() is experts]
        for parameter in dict(experts.named_parameters(recurse=False)):
            part.keep(experts, parameter, part.rows(), shares)
        for wrapper in wrappers:
            _cut_adapters(wrapper, part, shares)
        experts.num_experts = part.count  # type: ignore[assignment] - an int, though modules hold tensors
        experts.forward = Dispatch(experts.forward, group, part.count)
        apart.append(wrappers[0] if wrappers else experts)
    return apart


@dataclass(frozen=True, slots=True)
class _Part:
    """Which of `total` experts a rank holds: `count` of them from `start` on."""

    start: int
    count: int
    total: int

    @classmethod
    def of(cls, experts: nn.Module, index: int, ranks: int) -> _Part:
        total = _count(experts)
        count = total // ranks
        return cls(index * count, count, total)

    def rows(self, each: int = 1) -> tuple[tuple[int, int], ...]:
        """Where the experts lie in a dimension that holds `each` entries of the first, then of the second, ..."""
        return ((self.start * each, (self.start + self.count) * each),)

    def strided(self, times: int) -> tuple[tuple[int, int], ...]:
        """Where they lie in a dimension that repeats all experts `times` times."""
        return tuple((k * self.total + self.start, k * self.total + self.start + self.count) for k in range(times))

    def keep(
        self, module: nn.Module, name: str, ranges: tuple[tuple[int, int], ...], shares: Shares, dim: int = 0
    ) -> None:
        """Replace `module.<name>` by the entries of this rank, and note what they are."""
        whole = module.get_parameter(name)
        noted = shares.get(module, name) or Share(tuple(whole.shape))
        cut = Cut(dim, ranges)
        share = replace(noted, cuts=(*noted.cuts, cut), parts=noted.parts * self.total // self.count)
        setattr(module, name, nn.Parameter(cut.take(whole.detach()), requires_grad=whole.requires_grad))
        shares.put(module, name, share)


def _cut_adapters(wrapper: ParamWrapper, part: _Part, shares: Shares) -> None:
    """Cut LoRA matrices as PEFT stacks them: A [experts * r, in], B [out, r * experts]."""
    for adapter, lora_a in wrapper.lora_A.items():
        rank = wrapper.r[adapter]
        lora_b = wrapper.lora_B[adapter]
        part.keep(lora_a, "weight", part.rows(rank), shares)
        part.keep(lora_b, "weight", part.strided(rank), shares, dim=1)
        lora_a.out_features = lora_b.in_features = part.count * rank
    wrapper.num_experts = part.count
    # PEFT takes a single expert for a plain matrix, and has to be told if it lies the other way round.
    wrapper.fan_in_fan_out = part.count == 1 and bool(wrapper.get_base_layer().is_transposed)


def check_experts(root: nn.Module, ranks: int) -> None:
    """Refuse a model whose experts cannot be cut over so many ranks, before anything is.

    Raises:
        PlanError: there are none, their number does not divide, or they cannot be run on some tokens alone.
    """
    found = list(find_experts(root))
    if not found:
        raise PlanError(
            f"parallel.ep: {ranks} ranks cannot share the experts of this model ({type(root).__name__}), which are not "
            "stacked in one parameter. Use parallel.ep: 1; dp_shard shards them."
        )
    for name, experts in found:
        total = _count(experts)
        if total % ranks:
            raise PlanError(
                f"parallel.ep: {ranks} does not divide the {total} experts of {name}. Use a size that does."
            )
        others = [n for n, p in experts.named_parameters() if len(p) != total or "." in n]
        if others or not takes_choices(experts):
            what = f"parameters for all of them ({others[0]})" if others else "a forward pass of their own"
            raise PlanError(
                f"parallel.ep: the experts of this model ({name}, {type(experts).__name__}) have {what}, so tokens "
                "cannot be sent to them on other ranks. Use parallel.ep: 1; dp_shard shards them."
            )


def count_choices(indices: Tensor, num_experts: int) -> Tensor:
    """How often each expert is chosen, [num_experts]; numbers beyond them stand for no expert."""
    chosen = indices.reshape(-1).clamp(max=num_experts)
    return chosen.new_zeros(num_experts + 1).scatter_add_(0, chosen, torch.ones_like(chosen))[:-1]


def totals(sent: Tensor, arrived: Tensor, choices: int) -> tuple[list[int], list[int]]:
    """How many (token, choice) pairs, of `choices` at most, go to each rank and come from it, on the host.

    Args:
        sent, arrived: pairs for each expert of each rank, and from each rank for each expert here; [ranks, E].
    """
    to, come = torch.stack([sent.sum(1), arrived.sum(1)]).tolist()  # the one wait for the device in a layer
    return to, come


class Dispatch:
    """Stands in for the forward pass of a layer's experts: sends tokens to their experts' ranks and results back.

    The order of experts is that of the ranks: rank r of the group holds experts [r * count, (r + 1) * count).
    """

    def __init__(self, run: Run, group: dist.ProcessGroup, count: int) -> None:
        """Take the experts' own forward pass, the ranks that share them, and how many this rank holds."""
        self._run, self._group, self._count = run, group, count

    def __call__(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The experts' weighted outputs for this rank's tokens.

        Args:
            hidden_states: [T, H].
            indices: the experts of each token among all, [T, K]; a number beyond them stands for none.
            weights: [T, K].
        Returns:
            [T, H], in the dtype of `hidden_states`.
        """
        num_tokens, per_token = indices.shape
        sent, arrived = self._counts(indices)
        sizes = totals(sent, arrived, indices.numel())
        order = indices.reshape(-1).argsort(stable=True)[: sum(sizes[0])]  # choices of no expert come last
        tokens = _Exchange.apply(hidden_states[order // per_token], sizes[0], sizes[1], self._group)
        results = self._compute(tokens, arrived)
        back = _Exchange.apply(results, sizes[1], sizes[0], self._group)
        unsorted = back.new_zeros(num_tokens * per_token, back.shape[1]).index_copy(0, order, back)
        return (unsorted.view(num_tokens, per_token, -1) * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    def _counts(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many pairs go to each expert of each rank, and come from each rank for each expert here; [ranks, E]."""
        ranks = dist.get_world_size(self._group)
        sent = count_choices(indices, ranks * self._count)
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent, group=self._group)
        return sent.view(ranks, -1), arrived.view(ranks, -1)

    def _compute(self, tokens: Tensor, arrived: Tensor) -> Tensor:
        """This rank's experts on what has arrived, tokens [N, H] -> [N, H]; weights are applied by the sender."""
        if not len(tokens):
            # One row of zeros, thrown away again: the backward pass must reach every collective on every rank.
            one = arrived.new_zeros(1, 1)
            return self._run(F.pad(tokens, (0, 0, 0, 1)), one, torch.ones_like(one, dtype=tokens.dtype))[:0]
        numbers = torch.arange(self._count, device=tokens.device).repeat(len(arrived))
        experts = numbers.repeat_interleave(arrived.reshape(-1), output_size=len(tokens)).unsqueeze(1)
        return self._run(tokens, experts, torch.ones_like(experts, dtype=tokens.dtype))


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
