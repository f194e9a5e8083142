"""The gated delta rule, chunk by chunk, in plain PyTorch: what gated delta nets compute where no kernels for it are.

Each value head keeps a state S [Dk, Dv], which every position decays, corrects and reads (Gated Delta Networks,
arXiv 2412.06464), S_0 given or zero:

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_t-1 + beta_t k_t v_t^T,    o_t = S_t^T q_t / sqrt(Dk)

Positions are taken C at a time. With c_i the sum of g up to position i of a chunk and S the state before it, the rule
is a triangular system in what the positions write, one row each (the WY form of the paper's section 3.2):

    decay_ij = exp(c_i - c_j) for j <= i, else 0;    (I + L) N = beta V - (beta exp(c) K) S
    L_ij = beta_i (k_i . k_j) decay_ij for j < i;    O = (exp(c) Q S + P N) / sqrt(Dk), P = (Q K^T) * decay
    S' = exp(c_C) S + (exp(c_C - c) K)^T N

N = U - W S with (I + L) [U | W] = [beta V | beta exp(c) K], so S' = A S + B with A = exp(c_C) I - K'^T W and B = K'^T U
(K' = exp(c_C - c) K). Everything but S is computed for all chunks at once, and S by one product a chunk. The backward
pass is the same by hand: the gradients of states, D = A^T D' + (exp(c) Q)^T dO - W^T P^T dO (dO over sqrt(Dk)), by one
product a chunk, and all else at once.

Only the inputs are kept for the backward pass, which computes the rest again. Rows that are long go through in
segments, so that what is computed on the way stays small; before all but the first the state is kept, too.

Here are the function and its operators; `delta_chunks` computes a segment, and `delta_rule_use` says which models
compute the rule so.

Shape legend: B rows, S positions of each, Hk key heads, Hv value heads, a multiple of them, Dk and Dv their widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.base.delta_chunks import CHUNK, Chain, Segment, chunks_of, gradients_of, put_chunks

_SEGMENT = 2**17
"""Positions times value heads of a segment, so that a tensor of it is 64 MiB with heads that are 128 wide."""


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = CHUNK,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The rule on each row, in fp32, with the signature and the results of Transformers' function of that name.

    Args:
        query, key: [B S Hk Dk]. Each head serves Hv / Hk value heads in a row.
        value: [B S Hv Dv].
        g: [B S Hv], logarithms of decays, at most 0.
        beta: [B S Hv], 0 to 1, or to 2 where states may change their sign.
        chunk_size: not read; results do not depend on it.
        initial_state: [B Hv Dk Dv], before the first position; None for zero.
        output_final_state: return the state behind the last position, too.
        use_qk_l2norm_in_kernel: divide queries and keys by their norms first.
        kwargs: `cu_seqlens` and `seq_idx` must be None; others are not read.

    Returns:
        [B S Hv Dv] of the query's dtype, and the last state [B Hv Dk Dv] fp32, or None.

    Raises:
        ValueError: rows are said to hold several documents.
    """
    for name in ("cu_seqlens", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: a row of a gated delta net must be one document here. Give documents as rows of their own."
            )
    found: Any = _GatedDeltaRule.apply(query, key, value, g, beta, initial_state, use_qk_l2norm_in_kernel)
    return found[0], found[1] if output_final_state else None


_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, Tensor? initial_state"
_OPERATORS.define(f"gated_delta_rule({_INPUTS}, bool normalizes) -> (Tensor, Tensor, Tensor)")
_OPERATORS.define(
    f"gated_delta_rule_back(Tensor grad_out, Tensor grad_state, {_INPUTS}, Tensor between, bool normalizes)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_OPERATORS, "gated_delta_rule", "CompositeExplicitAutograd")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalizes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states between segments [segments-1 B Hv Dk Dv]; of inputs as the function's."""
    inputs = (query, key, value, g, beta)
    state = _first_state(initial_state, key, value)
    between = state.new_empty((_num_segments(value) - 1, *state.shape))
    out = torch.empty_like(value, dtype=query.dtype, memory_format=torch.contiguous_format)
    with _products(query):
        for number, part in enumerate(_segments(value)):
            if number:
                between[number - 1] = state
            segment = Segment.of(*(tensor[:, part] for tensor in inputs), normalizes=normalizes)
            chain = Chain.of(segment, state)
            put_chunks(chain.outputs(segment), out[:, part])
            state = chain.states[-1].clone()  # the others are let go
    return out, state, between


@torch.library.register_fake("fourfold::gated_delta_rule", lib=_OPERATORS)
def _forward_of_fakes(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    state = _first_state(None, key, value)
    out = torch.empty_like(value, dtype=query.dtype, memory_format=torch.contiguous_format)
    return out, state, state.new_empty((_num_segments(value) - 1, *state.shape))


@torch.library.impl(_OPERATORS, "gated_delta_rule_back", "CompositeExplicitAutograd")
def _backward_pass(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    between: Tensor,
    normalizes: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the inputs, in their dtypes, and that of the first state in fp32."""
    inputs = (query, key, value, g, beta)
    found = _like(inputs)
    states = [_first_state(initial_state, key, value), *between.unbind()]
    with _products(query):
        for part in reversed(_segments(value)):
            segment = Segment.of(*(x[:, part] for x in inputs), normalizes=normalizes)
            *made, grad_state = gradients_of(segment, states.pop(), chunks_of(grad_out[:, part]), grad_state)
            for grad, whole in zip(made, found, strict=True):
                put_chunks(grad, whole[:, part])
    return *found, grad_state


@torch.library.register_fake("fourfold::gated_delta_rule_back", lib=_OPERATORS)
def _backward_of_fakes(grad_out: Tensor, grad_state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return *_like(inputs[:5]), torch.empty_like(grad_state, memory_format=torch.contiguous_format)


def _like(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


class _GatedDeltaRule(torch.autograd.Function):
    """The rule, of which only the inputs are kept, and the states between segments."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        normalizes: bool,
    ) -> tuple[Tensor, Tensor]:
        """As `chunk_gated_delta_rule`."""
        inputs = (query, key, value, g, beta, initial_state)
        out, state, between = torch.ops.fourfold.gated_delta_rule(*inputs, normalizes)
        ctx.normalizes = normalizes
        ctx.save_for_backward(*inputs, between)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor, grad_state: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, in their dtypes."""
        *inputs, initial_state, between = ctx.saved_tensors
        found = torch.ops.fourfold.gated_delta_rule_back(
            grad_out, grad_state, *inputs, initial_state, between, ctx.normalizes
        )
        *grads, grad_initial = found
        return *grads, None if initial_state is None else grad_initial.to(initial_state.dtype), None


@contextmanager
def _products(inputs: Tensor) -> Iterator[None]:
    """In fp32 whatever autocast says; of inputs of 16 bits, on GPUs, with factors rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(inputs.device.type, enabled=False):
        if inputs.is_cuda and inputs.itemsize == 2:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _num_segments(value: Tensor) -> int:
    """Of [B S Hv Dv]."""
    return -(-value.shape[1] // _segment_size(value))


def _segment_size(value: Tensor) -> int:
    """Positions of a segment, a whole number of chunks."""
    rows, _, heads, _ = value.shape
    return max(_SEGMENT // (rows * heads) // CHUNK, 1) * CHUNK


def _segments(value: Tensor) -> list[slice]:
    """Positions of each segment of [B S Hv Dv]."""
    positions, size = value.shape[1], _segment_size(value)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _first_state(initial_state: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
    """[B Hv Dk Dv] fp32."""
    if initial_state is not None:
        return initial_state.float()
    rows, _, heads, width = value.shape
    return value.new_zeros((rows, heads, key.shape[-1], width), dtype=torch.float32)
