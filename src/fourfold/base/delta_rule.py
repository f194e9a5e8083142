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

Shape legend: B rows, S positions of each, Hk key heads, Hv value heads, a multiple of them, Dk and Dv their widths;
C positions of a chunk; N chunks of a segment; R = N B Hk chunks of key heads and M = N B Hv chunks of value heads, in
that order: all rows and heads of a chunk, then those of the next.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.torch_version import TorchVersion

from fourfold.base.log import get_logger

log = get_logger(__name__)

_NAME = "torch_chunk_gated_delta_rule"
"""What modules of Transformers that have gated delta nets call the rule."""
_CHUNK = 64
"""Positions of a chunk: results do not depend on it. Of 32, 64 and 128 the fastest on a CPU with heads that are 128
wide."""
_BLOCK = 16
"""Positions of the diagonal blocks of a chunk that are inverted as a whole; a power of two, as `_CHUNK` is."""
_SEGMENT = 2**17
"""Positions times value heads of a segment, so that a tensor of it is 64 MiB with heads that are 128 wide."""
_EPS = 1e-6
"""Added to the square of a query's or a key's norm, as Transformers does."""


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = _CHUNK,
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
            segment = _Segment.of(*(tensor[:, part] for tensor in inputs), normalizes=normalizes)
            chain = _Chain.of(segment, state)
            _put(chain.outputs(segment), out[:, part])
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
            segment = _Segment.of(*(x[:, part] for x in inputs), normalizes=normalizes)
            *made, grad_state = _backward(segment, states.pop(), _chunks(grad_out[:, part]), grad_state)
            for grad, whole in zip(made, found, strict=True):
                _put(grad, whole[:, part])
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
    return max(_SEGMENT // (rows * heads) // _CHUNK, 1) * _CHUNK


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


def _chunks(rows: Tensor) -> Tensor:
    """The chunks of each head, [B S H *] -> [N*B*H C *] fp32, contiguous; zero behind the rows' ends."""
    missing = -rows.shape[1] % _CHUNK
    if missing:
        rows = F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, missing))
    ordered = rows.unflatten(1, (-1, _CHUNK)).movedim((1, 3), (0, 2))
    return ordered.to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 2)


def _put(chunks: Tensor, rows: Tensor) -> None:
    """Write what `_chunks` gives of rows [B S H *] into them, but for what is behind their ends."""
    ordered = chunks.unflatten(0, (-1, len(rows), rows.shape[2])).movedim((0, 2), (1, 3))
    if rows.shape[1] % _CHUNK == 0:
        rows.unflatten(1, (-1, _CHUNK)).copy_(ordered)
    else:
        rows.copy_(ordered.flatten(1, 2)[:, : rows.shape[1]])


def _each(few: Tensor, many: Tensor) -> Tensor:
    """Products of key heads with each of their value heads, [R *] and [M *] -> [M *]."""
    return (few.unsqueeze(1) * many.unflatten(0, (len(few), -1))).flatten(0, 1)


def _gathered(many: Tensor, few: int) -> Tensor:
    """Sums over the value heads of each of `few` (R) key heads, [M *] -> [R *]."""
    return many if len(many) == few else many.unflatten(0, (few, -1)).sum(1)


@dataclass(slots=True)
class _Segment:
    """What of a segment does not depend on the state before it. All fp32.

    Attributes:
        query, key: [R C Dk]; divided by their norms if asked.
        query_norms, key_norms: [R C 1], one over the norms; None if they are left as they are.
        value: [M C Dv].
        beta, grown, left: [M C 1]; beta, exp(c) and exp(c_C - c).
        decay: [M C C].
        overlap: [M C C], (K K^T) * decay.
        scores: [M C C], P.
        inverse: [M C C], (I + L)^-1.
        solved: [M C Dv+Dk], [U | W].
    """

    query: Tensor
    key: Tensor
    query_norms: Tensor | None
    key_norms: Tensor | None
    value: Tensor
    beta: Tensor
    grown: Tensor
    left: Tensor
    decay: Tensor
    overlap: Tensor
    scores: Tensor
    inverse: Tensor
    solved: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *, normalizes: bool) -> _Segment:
        """Of positions of the inputs, as `chunk_gated_delta_rule` takes them."""
        query, key, value, g, beta = map(_chunks, (query, key, value, g, beta))
        query_norms = key_norms = None
        if normalizes:
            query_norms, key_norms = ((x.square().sum(-1, keepdim=True) + _EPS).rsqrt() for x in (query, key))
            query, key = query * query_norms, key * key_norms
        beta, total = beta.unsqueeze(-1), g.cumsum(-1)
        grown, left = total.exp().unsqueeze(-1), (total[:, -1:] - total).exp().unsqueeze(-1)
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(_later(g.device), -torch.inf).exp_()
        overlap, scores = _each(key @ key.mT, decay), _each(query @ key.mT, decay)
        inverse = _inverse((overlap * beta).tril_(-1))
        solved = inverse @ torch.cat((value * beta, _each(key, beta * grown)), -1)
        return cls(
            query=query,
            key=key,
            query_norms=query_norms,
            key_norms=key_norms,
            value=value,
            beta=beta,
            grown=grown,
            left=left,
            decay=decay,
            overlap=overlap,
            scores=scores,
            inverse=inverse,
            solved=solved,
        )

    @property
    def scale(self) -> float:
        """One over the square root of Dk."""
        return self.key.shape[-1] ** -0.5

    @property
    def written(self) -> Tensor:
        """U [M C Dv]."""
        return self.solved[..., : self.value.shape[-1]]

    @property
    def reading(self) -> Tensor:
        """W [M C Dk]."""
        return self.solved[..., self.value.shape[-1] :]


@dataclass(slots=True)
class _Chain:
    """The states of a segment, and what is computed from them. All fp32.

    Attributes:
        keys: [M C Dk], K'.
        queries: [M C Dk], exp(c) Q.
        steps: [N B*Hv Dk Dk], A of each chunk.
        states: [N+1 B Hv Dk Dv], before each chunk and behind the last.
        news: [M C Dv], the rows of N in the docstring of this module.
    """

    keys: Tensor
    queries: Tensor
    steps: Tensor
    states: Tensor
    news: Tensor

    @classmethod
    def of(cls, segment: _Segment, state: Tensor) -> _Chain:
        """From the state before a segment, [B Hv Dk Dv]."""
        keys, queries = _each(segment.key, segment.left), _each(segment.query, segment.grown)
        steps = (keys.mT @ segment.reading).neg_()
        steps.diagonal(dim1=-2, dim2=-1).add_(segment.grown[:, -1])
        steps = steps.unflatten(0, (-1, state.shape[0] * state.shape[1]))
        states = state.new_empty((len(steps) + 1, *state.shape))
        states[0] = state
        torch.bmm(keys.mT, segment.written, out=states[1:].flatten(0, 2))
        flat = states.flatten(1, 2)
        for chunk in range(len(steps)):
            flat[chunk + 1].baddbmm_(steps[chunk], flat[chunk])
        news = torch.baddbmm(segment.written, segment.reading, states[:-1].flatten(0, 2), alpha=-1)
        return cls(keys, queries, steps, states, news)

    def outputs(self, segment: _Segment) -> Tensor:
        """O [M C Dv]."""
        read = self.queries @ self.states[:-1].flatten(0, 2)
        return read.baddbmm_(segment.scores, self.news, beta=segment.scale, alpha=segment.scale)


def _inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 of strictly lower triangular L, [M C C] -> [M C C].

    Of twice as large blocks on the diagonal from the inverses X and Y of their halves: [[X, 0], [-Y L_21 X, Y]]. The
    product of I + (-L)^(2^i) over i is the same and takes fewer steps, but where keys are alike nothing is left of it
    in fp32: entries of L's powers are then as large as binomials of C, and the sum of them at most 1 or 2.
    """
    small = _blocks(lower, _BLOCK)
    unit, masks = _masks(lower.device)
    made, size = unit.expand_as(small), 1
    for mask in masks:
        # both halves of all blocks of 2 * size at once, the rest masked: tiny products cost more than what they save
        beneath = small * mask
        made = made - (beneath if size == 1 else made @ beneath @ made)
        size *= 2
    while size < _CHUNK:
        beneath = _blocks(lower, 2 * size)[:, size:, :size]
        first, second = made[::2], made[1::2]
        made = lower.new_zeros((len(first), 2 * size, 2 * size))
        made[:, :size, :size], made[:, size:, size:] = first, second
        made[:, size:, :size] = (second @ beneath @ first).neg_()
        size *= 2
    return made


@lru_cache(maxsize=8)
def _masks(device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The unit block, and of blocks of twice 1, 2, 4, ... positions what is beneath their diagonal halves."""
    place = torch.arange(_BLOCK)
    sizes = [2**power for power in range(_BLOCK.bit_length() - 1)]
    found = [
        (place[:, None] // size != place // size) & (place[:, None] // (2 * size) == place // (2 * size))
        for size in sizes
    ]
    return torch.eye(_BLOCK, device=device), tuple(mask.to(device) for mask in found)


@lru_cache(maxsize=8)
def _later(device: torch.device) -> Tensor:
    """Which positions of a chunk each does not see."""
    return torch.ones((_CHUNK, _CHUNK), dtype=torch.bool, device=device).triu_(1)


def _blocks(square: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal, [M C C] -> [M*C/size size size]."""
    cut = square.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


def _backward(segment: _Segment, state: Tensor, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
    """Gradients of what a segment is computed from. All fp32.

    Args:
        segment: what is no longer needed of it is taken out of it, to be freed.
        state: [B Hv Dk Dv], before the segment.
        grad_out: [M C Dv]; overwritten.
        grad_state: [B Hv Dk Dv], of the state behind the segment.

    Returns:
        Those of query and key [R C Dk], value [M C Dv], g and beta [M C], and of the state before it [B Hv Dk Dv].
    """
    chain = _Chain.of(segment, state)
    few, width = len(segment.key), segment.value.shape[-1]
    beta, grown, left = segment.beta, segment.grown, segment.left
    grad_out.mul_(segment.scale)
    grad_news = segment.scores.mT @ grad_out
    of_states = _grad_states(segment, chain, grad_out, grad_news, grad_state)
    before, behind = chain.states[:-1].flatten(0, 2), of_states[1:].flatten(0, 2)
    grad_state = of_states[0].clone()
    del chain.steps, chain.queries, of_states

    grad_news.baddbmm_(chain.keys, behind)
    del chain.keys
    grad_told = torch.cat((grad_news, (grad_news @ before.mT).neg_()), -1)
    del grad_news
    grad_told = segment.inverse.mT @ grad_told
    grad_lower = (grad_told @ segment.solved.mT).neg_().tril_(-1)
    del segment.inverse, segment.solved
    of_values, of_keys = grad_told[..., :width], grad_told[..., width:]
    grad_scores = grad_out @ chain.news.mT
    grad_queries, grad_keys = grad_out @ before.mT, chain.news @ behind.mT
    last = (behind.flatten(1).unsqueeze(1) @ before.flatten(1).unsqueeze(2)).flatten()  # of exp(c_C)
    del chain, before, behind, grad_out

    read = _each(segment.key, of_keys).sum(-1, keepdim=True) * grown
    grad_beta = (of_values * segment.value).sum(-1, keepdim=True) + read
    grad_beta += (grad_lower * segment.overlap).sum(-1, keepdim=True)
    grad_lower *= beta

    # of c, whose differences decay is made of, and with it overlap and P; then of g, which it sums up
    of_decay = grad_scores * segment.scores + grad_lower * segment.overlap
    of_left = _each(segment.key, grad_keys).sum(-1) * left.squeeze(-1)
    of_total = of_decay.sum(-1) - of_decay.sum(-2) + (read * beta).squeeze(-1) - of_left
    of_total += _each(segment.query, grad_queries).sum(-1) * grown.squeeze(-1)
    of_total[:, -1] += of_left.sum(-1) + last * grown[:, -1, 0]
    grad_g = of_total.flip(-1).cumsum(-1).flip(-1)

    of_scores, of_overlap = _gathered(grad_scores * segment.decay, few), _gathered(grad_lower * segment.decay, few)
    grad_query = _gathered(grad_queries.mul_(grown), few).baddbmm_(of_scores, segment.key)
    grad_keys = grad_keys.mul_(left).addcmul_(of_keys, beta * grown)
    grad_key = _gathered(grad_keys, few).baddbmm_(of_scores.mT, segment.query)
    grad_key.baddbmm_(of_overlap + of_overlap.mT, segment.key)
    return (
        _through_norm(grad_query, segment.query, segment.query_norms),
        _through_norm(grad_key, segment.key, segment.key_norms),
        of_values * beta,
        grad_g,
        grad_beta.squeeze(-1),
        grad_state,
    )


def _grad_states(segment: _Segment, chain: _Chain, grad_out: Tensor, grad_news: Tensor, grad_state: Tensor) -> Tensor:
    """Gradients of all states of a segment, [N+1 B Hv Dk Dv].

    Args:
        grad_out: [M C Dv], over sqrt(Dk).
        grad_news: [M C Dv], what reaches N from it: P^T dO.
        grad_state: [B Hv Dk Dv], of the state behind the segment.
    """
    found = torch.empty_like(chain.states)
    found[-1] = grad_state
    direct = found[:-1].flatten(0, 2)
    torch.bmm(chain.queries.mT, grad_out, out=direct)
    direct.baddbmm_(segment.reading.mT, grad_news, alpha=-1)
    flat = found.flatten(1, 2)
    for chunk in reversed(range(len(chain.steps))):
        flat[chunk].baddbmm_(chain.steps[chunk].mT, flat[chunk + 1])
    return found


def _through_norm(grad: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor:
    """Gradient of x [* D] where that of x / sqrt(|x|^2 + eps), `unit`, is `grad`.

    Args:
        inverse: [* 1], one over the root; None where x was not divided, and `unit` is x.
    """
    return grad if inverse is None else (grad - unit * (unit * grad).sum(-1, keepdim=True)) * inverse


def is_wanted(device: torch.device) -> bool:
    """Whether gated delta nets would not train on this device with what Transformers finds for them, or only slowly.

    Transformers takes the kernels of flash-linear-attention (`fla`) where it can import them, and its own reference
    implementation else. The kernels are for GPUs, and their backward pass raises an error on Hopper GPUs for some
    versions of Triton, of which TileLang's take the place where it is installed (`chunk_bwd_dqkwg` of fla 0.6.0; its
    issue 640).
    """
    return not _has_fla() or device.type == "cpu" or not _fla_trains(device)


def _has_fla() -> bool:
    """Whether Transformers can import the rule from `fla`; one that is installed may not fit its surroundings."""
    try:
        return hasattr(importlib.import_module("fla.ops.gated_delta_rule"), "chunk_gated_delta_rule")
    except Exception:  # as Transformers does
        return False


def _fla_trains(device: torch.device) -> bool:
    """Whether the backward pass of `fla`, which is there, runs on a GPU."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return True
    triton = TorchVersion(importlib.import_module("triton").__version__)
    return triton < "3.4.0" or triton >= "3.7.1" or _has_tilelang()


def _has_tilelang() -> bool:
    """Whether `fla` takes TileLang's kernels: it is installed, and so is what it compiles with."""
    if importlib.util.find_spec("tilelang") is None or os.environ.get("FLA_TILELANG") == "0":
        return False
    has_compiler = getattr(importlib.import_module("fla.utils"), "has_usable_nvcc", None)  # of fla 0.6
    return has_compiler is None or has_compiler()


@contextmanager
def exchanged(mixer: nn.Module) -> Iterator[None]:
    """Within it a layer's module computes the rule as here, if it computes it at all, wherever it is."""
    place = sys.modules[type(mixer).__module__]
    own = getattr(place, _NAME, None)
    if own is None:
        yield
        return
    setattr(place, _NAME, chunk_gated_delta_rule)
    try:
        yield
    finally:
        setattr(place, _NAME, own)


def install(model: nn.Module, device: torch.device) -> bool:
    """Have a model's gated delta nets compute the rule as here, where that is wanted (`is_wanted`).

    The function is exchanged in the modules of Transformers where the model's classes are, so for all models of its
    family in this process. Calling it again changes nothing.

    Args:
        device: where the model will train.

    Returns:
        Whether they compute it as here now.
    """
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    places = [place for name in sorted(names) if hasattr(place := sys.modules.get(name), _NAME)]
    if not places or not is_wanted(device):
        return False
    others = [place for place in places if getattr(place, _NAME) is not chunk_gated_delta_rule]
    for place in others:
        setattr(place, _NAME, chunk_gated_delta_rule)
    if others and device.type == "cuda" and _has_fla():
        log.info(
            "flash-linear-attention is installed, but its gated delta rule does not train on this GPU with Triton %s: "
            "it is computed without it. Install tilelang, or Triton 3.7.1 or later, for its faster kernels.",
            importlib.import_module("triton").__version__,
        )
    return True
