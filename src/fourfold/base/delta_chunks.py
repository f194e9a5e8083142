"""The gated delta rule of one segment of a row, and its gradients, all its chunks at once (`delta_rule` says how).

Shape legend: B rows, Hk key heads, Hv value heads, Dk and Dv their widths; C positions of a chunk; N chunks of the
segment; R = N B Hk chunks of key heads and M = N B Hv chunks of value heads, in that order: all rows and heads of a
chunk, then those of the next. Capitals that stand alone are the matrices of `delta_rule`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Positions of a chunk: results do not depend on it. Of 32, 64 and 128 the fastest on a CPU with heads that are 128
wide."""
_BLOCK = 16
"""Positions of the diagonal blocks of a chunk that are inverted as a whole; a power of two, as `CHUNK` is."""
_EPS = 1e-6
"""Added to the square of a query's or a key's norm, as Transformers does."""


def chunks_of(rows: Tensor) -> Tensor:
    """The chunks of each head, [B S H *] -> [N*B*H C *] fp32, contiguous; zero behind the rows' ends."""
    missing = -rows.shape[1] % CHUNK
    if missing:
        rows = F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, missing))
    ordered = rows.unflatten(1, (-1, CHUNK)).movedim((1, 3), (0, 2))
    return ordered.to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 2)


def put_chunks(chunks: Tensor, rows: Tensor) -> None:
    """Write what `chunks_of` gives of rows [B S H *] into them, but for what is behind their ends."""
    ordered = chunks.unflatten(0, (-1, len(rows), rows.shape[2])).movedim((0, 2), (1, 3))
    if rows.shape[1] % CHUNK == 0:
        rows.unflatten(1, (-1, CHUNK)).copy_(ordered)
    else:
        rows.copy_(ordered.flatten(1, 2)[:, : rows.shape[1]])


def _each(few: Tensor, many: Tensor) -> Tensor:
    """Products of key heads with each of their value heads, [R *] and [M *] -> [M *]."""
    return (few.unsqueeze(1) * many.unflatten(0, (len(few), -1))).flatten(0, 1)


def _gathered(many: Tensor, few: int) -> Tensor:
    """Sums over the value heads of each of `few` (R) key heads, [M *] -> [R *]."""
    return many if len(many) == few else many.unflatten(0, (few, -1)).sum(1)


@dataclass(slots=True)
class Segment:
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
    def of(cls, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *, normalizes: bool) -> Segment:
        """Of positions of the inputs, as `chunk_gated_delta_rule` takes them."""
        query, key, value, g, beta = map(chunks_of, (query, key, value, g, beta))
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
class Chain:
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
    def of(cls, segment: Segment, state: Tensor) -> Chain:
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

    def outputs(self, segment: Segment) -> Tensor:
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
    while size < CHUNK:
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
    return torch.ones((CHUNK, CHUNK), dtype=torch.bool, device=device).triu_(1)


def _blocks(square: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal, [M C C] -> [M*C/size size size]."""
    cut = square.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


def gradients_of(segment: Segment, state: Tensor, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
    """Gradients of what a segment is computed from. All fp32.

    Args:
        segment: what is no longer needed of it is taken out of it, to be freed.
        state: [B Hv Dk Dv], before the segment.
        grad_out: [M C Dv]; overwritten.
        grad_state: [B Hv Dk Dv], of the state behind the segment.

    Returns:
        Those of query and key [R C Dk], value [M C Dv], g and beta [M C], and of the state before it [B Hv Dk Dv].
    """
    chain = Chain.of(segment, state)
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


def _grad_states(segment: Segment, chain: Chain, grad_out: Tensor, grad_news: Tensor, grad_state: Tensor) -> Tensor:
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
