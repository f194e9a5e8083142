"""The forward pass of stacked experts that are all on this rank, without passes over memory that it does not need
(see `expert_rows`).

Products, gates and activations are those of Transformers (`transformers.integrations.moe`, 5.17 to 5.24).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import (
    _default_apply_gate,  # pyright: ignore[reportPrivateUsage] - what is replaced
    _grouped_mm,  # pyright: ignore[reportPrivateUsage] - it knows which version of torch multiplies what
)

from fourfold.base.inductor import beside
from fourfold.parallel.expert_rows import combine, count_choices, sort_choices, spread
from fourfold.parallel.stacked_experts import find_experts, takes_choices

_MOST_EXPERTS = torch.iinfo(torch.int16).max
ADAPTERS = "_fourfold_adapters"
"""Name of an attribute of experts: by parameter, what an adapter adds to its products (`expert_adapters`)."""
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

    own: Any = experts
    gate = {"_apply_gate": _apply_gate} if own._apply_gate is _default_apply_gate else {}
    return type(experts.__name__, (experts,), {"forward": forward, _IS_LOCAL: True, **gate})


def _apply_gate(experts: Any, outer: Tensor) -> Tensor:
    """Transformers' default: outer [N, 2 I] -> [N, I]."""
    gate, up = _Halves.apply(outer)  # type: ignore[misc]
    return experts.act_fn(gate) * up


class _Halves(torch.autograd.Function):
    """Both halves of rows, whose gradients a compiler writes where they belong, each by itself."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """rows [N, 2 I] -> [N, I] twice, views."""
        first, second = rows.chunk(2, -1)
        return first, second

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of both, [N, I] each."""
        return beside([first, second])


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
    chosen, order, inverse = sort_choices(top_k_index)
    ends = torch.cumsum(count_choices(chosen, experts.num_experts), 0, dtype=torch.int32)
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


def _product(experts: Any, name: str, rows: Tensor, chosen: Tensor | None, ends: Tensor) -> Tensor:
    """Each row times its expert's matrix, [T K, in] -> [T K, out]."""
    weight = getattr(experts, name)
    # torch's own grouped product has no kernel for fp64, which only tests need
    multiply = _grouped_mm if weight.dtype != torch.float64 else torch.ops.transformers.grouped_mm_fallback
    found = multiply(rows, weight if experts.is_transposed else weight.transpose(-2, -1), ends)
    adapters = getattr(experts, ADAPTERS, None)
    if adapters and name in adapters:
        found = found + adapters[name](rows.to(found.dtype), lambda inputs, matrices: multiply(inputs, matrices, ends))
    # in place, as planning/activations.py and parallel/recompute.py know it
    return (
        found if chosen is None or not experts.has_bias else found.add_(getattr(experts, f"{name}_bias")[chosen.int()])
    )
