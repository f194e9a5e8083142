"""The forward pass of stacked experts that are all on this rank, without passes over memory that it does not need.

Each (token, choice) pair is a row. Rows are sorted by expert once, and both the order and its inverse are kept: with
them every gradient is read from where it lies, as the results are. Left to autograd, the gradient of reading rows is
adding rows into zeros, which takes several passes and, on a GPU, atomic additions in no fixed order.

Products, gates and activations are those of Transformers (`transformers.integrations.moe`, 5.17 to 5.24).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import (
    _grouped_mm,  # pyright: ignore[reportPrivateUsage] - it knows which version of torch multiplies what
)

from fourfold.parallel.stacked_experts import find_experts, takes_choices

_MOST_EXPERTS = torch.iinfo(torch.int16).max
_IS_LOCAL = "_fourfold_is_local"
"""Name of an attribute of classes that run as here."""


def use_local_experts(model: nn.Module) -> int:
    """Let stacked experts run as here wherever Transformers would take its grouped products; in place.

    Experts with something that is not known here are left as they are: an own forward pass, packed weights, norms
    behind the experts, Transformers' own expert parallelism.

    Returns:
        how many layers' experts do.
    """
    found = [experts for _, experts in find_experts(model) if _is_known(experts)]
    for experts in found:
        # the class is exchanged: a compiler makes a function in a module's `forward` anew for each layer
        experts.__class__ = _local_class(type(experts))
    return len(found)


def _is_known(experts: nn.Module) -> bool:
    own = vars(experts)
    if not takes_choices(experts) or "forward" in own or "__wrapped__" not in vars(type(experts).forward):
        return False
    if own.get("has_post_expert_norm") or own.get("_is_expert_parallel"):
        return False
    names = {"gate_up_proj" if own["has_gate"] else "up_proj", "down_proj"}
    names |= {f"{name}_bias" for name in names} if own["has_bias"] else set()
    parameters = dict(experts.named_parameters(recurse=False))
    plain = all(p.dtype.is_floating_point and p.dtype.itemsize > 1 for p in parameters.values())
    return set(parameters) == names and plain and own["num_experts"] <= _MOST_EXPERTS


@lru_cache(maxsize=64)
def _local_class(experts: type[nn.Module]) -> type[nn.Module]:
    """A class of experts that run as here; as their own where another implementation is set, as for generation."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _is_chosen(self):
            return experts.forward(self, *args, **kwargs)
        return run_experts(self, *args, **kwargs)

    return type(experts.__name__, (experts,), {"forward": forward, _IS_LOCAL: True})


def takes_rows(experts: nn.Module) -> bool:
    """Whether experts would run as here, so that `run_rows` does what they do."""
    return hasattr(type(experts), _IS_LOCAL) and _is_chosen(experts)


def _is_chosen(experts: Any) -> bool:
    return experts.config._experts_implementation == "grouped_mm"


def run_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted outputs of each token's experts.

    Args:
        experts: stacked, of a class that Transformers' `use_experts_implementation` made.
        hidden_states: [T, H].
        top_k_index: the experts of each token, [T, K], all of them below `experts.num_experts`.
        top_k_weights: [T, K].
    Returns:
        [T, H], in the dtype of `hidden_states`; summed over a token's experts in fp32 at least.
    """
    chosen, order, inverse, ends = sort_choices(top_k_index, experts.num_experts)
    results = run_rows(experts, spread(hidden_states, order, inverse), ends, chosen)
    return combine(results, top_k_weights, order, inverse, hidden_states.dtype)


def run_rows(experts: Any, rows: Tensor, ends: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What experts make of rows.

    Args:
        experts: as above.
        rows: sorted by expert, [N, H].
        ends: where the rows of each expert end, [experts] int32.
        chosen: the expert of each row, [N], where it is known; found by `ends` where it is needed and not.
    Returns:
        [N, H], without weights.
    """
    if chosen is None and experts.has_bias:
        sizes = ends.diff(prepend=ends.new_zeros(1))
        chosen = torch.repeat_interleave(torch.arange(len(sizes), device=ends.device), sizes, output_size=len(rows))
    outer = _product(experts, "gate_up_proj" if experts.has_gate else "up_proj", rows, chosen, ends)
    inner = experts._apply_gate(outer) if experts.has_gate else experts.act_fn(outer)
    return _product(experts, "down_proj", inner, chosen, ends)


def spread(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in the order of experts: tokens [T, H], `order` and `inverse` of `sort_choices` -> [T K, H]."""
    return _Spread.apply(tokens, order, inverse)  # type: ignore[return-value]


def combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum of each token's rows: rows [T K, H], weights [T, K] -> [T, H] of `dtype`, summed in fp32 at
    least."""
    return _Combine.apply(rows, weights, order, inverse, dtype)  # type: ignore[return-value]


def sort_choices(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The (token, choice) pairs in the order of experts.

    Args:
        indices: [T, K], from 0 to `num_experts` - 1, which is at most 32,767.
    Returns:
        chosen: the expert of each row, [T K] int16.
        order: the pair of each row, [T K] int64; pair t K + j is choice j of token t.
        inverse: the row of each pair, [T, K] int64.
        ends: where the rows of each expert end, [num_experts] int32.
    """
    # of 16 bits, a radix sort takes a quarter of the passes that it takes of 64
    chosen, order = torch.sort(indices.reshape(-1).to(torch.int16), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    # counted as Transformers does it: histc takes floats alone on a CPU
    counted = chosen.float() if chosen.device.type in ("cpu", "mps") else chosen.int()
    sizes = torch.histc(counted, bins=num_experts, min=0, max=num_experts - 1)
    return chosen, order, inverse.view(indices.shape), torch.cumsum(sizes, 0, dtype=torch.int32)


def _product(experts: Any, name: str, rows: Tensor, chosen: Tensor | None, ends: Tensor) -> Tensor:
    """Each row times its expert's matrix, [T K, in] -> [T K, out]."""
    weight = getattr(experts, name)
    # torch's own grouped product has no kernel for fp64, which only tests need
    multiply = _grouped_mm if weight.dtype != torch.float64 else torch.ops.transformers.grouped_mm_fallback
    found = multiply(rows, weight if experts.is_transposed else weight.transpose(-2, -1), ends)
    # in place, as planning/activations.py and parallel/recompute.py know it
    return (
        found if chosen is None or not experts.has_bias else found.add_(getattr(experts, f"{name}_bias")[chosen.int()])
    )


def _weighted_sum(rows: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum over a token's choices of its rows, weighted if asked: [T K, H], [T, K], [T, K] -> [T, H] of `dtype`.

    In fp32 at least, and never with a tensor of all rows in it: one kernel of torch's, or choice after choice, of which
    a compiler makes one pass.
    """
    alike = rows.dtype == dtype and (weights is None or weights.dtype == dtype)
    if alike and not torch.compiler.is_compiling():
        return F.embedding_bag(inverse, rows, mode="sum", per_sample_weights=weights)
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(inverse.shape[0], rows.shape[1], dtype=wide)
    for choice in range(inverse.shape[1]):
        part = rows[inverse[:, choice]]
        total = total + part if weights is None else torch.addcmul(total, part, weights[:, choice, None])
    return total.to(dtype)


class _Spread(torch.autograd.Function):
    """Rows of tokens, in the order of experts; the gradient of a token is the sum of its rows'."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """tokens [T, H], order [T K], inverse [T, K] -> [T K, H]."""
        ctx.save_for_backward(inverse)
        return tokens[order // inverse.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T K, H]."""
        (inverse,) = ctx.saved_tensors
        return _weighted_sum(grad, inverse, None, grad.dtype), None, None


class _Combine(torch.autograd.Function):
    """out[t] = sum_j weights[t, j] * rows[inverse[t, j]]."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """rows [T K, H], weights [T, K], order [T K], inverse [T, K] -> [T, H] of `dtype`."""
        # weights without a gradient are those of tokens from other ranks, or of a router outside of what is trained
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, order, inverse)
        ctx.rows_dtype = rows.dtype
        return _weighted_sum(rows, inverse, weights, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T, H]: drows = weights * grad, dweights = <rows, grad>, both row by row."""
        rows, weights, order, inverse = ctx.saved_tensors
        choices = inverse.shape[1]
        spread = grad.to(ctx.rows_dtype)[order // choices]
        of_weights = None
        if rows is not None:
            wide = torch.promote_types(weights.dtype, torch.float32)
            of_weights = (rows * spread).sum(-1, dtype=wide)[inverse].to(weights.dtype)
        return spread.mul_(weights.reshape(-1)[order, None]), of_weights, None, None, None
