"""Choosing tokens: Transformers' processors on the logits, and noise that depends on nothing but its keys.

With logits z_v and u_v uniform in (0, 1), E_v = -log(1 - u_v) is exponentially distributed, and

    argmax_v  z_v - log E_v

is a draw from softmax(z) (the Gumbel-max trick). Each u_v is a hash of (seed, key of the prompt, position in the
answer, token), so a prompt gets the same answer in whatever company and under whatever layout it is answered, as far
as rounding allows: another token is drawn only where two candidates are closer than the logits' rounding.

Shape legend: N rows, V tokens of the vocabulary, W candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.generate.interface import Sampling
from fourfold.models.noise import hash32, mix32

_GOLDEN = -1640531527  # 2**32 / golden ratio, as int32


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        tokens: [N] int64.
        logprobs: [N] fp32 under the full softmax of the model's own logits at temperature 1; None unless asked for.
    """

    tokens: Tensor
    logprobs: Tensor | None


def state_of(seed: int, key: int) -> int:
    """The noise of a prompt's answer, as int32."""
    return mix32(seed, seed >> 32, key, key >> 32)


def choose(
    logits: Tensor, sampling: Sampling, states: Tensor, positions: Tensor, seen: Tensor | None, *, logprobs: bool
) -> Choice:
    """One token for each row.

    Args:
        logits: [N, V], of the whole vocabulary.
        states: [N] int32, from `state_of`.
        positions: [N] int64, how many tokens of the answer there are already.
        seen: [N, V] bool, tokens of prompt and answer so far; None without a repetition penalty.
    """
    logits = logits.float()
    scores = logits if seen is None else penalize(logits, seen, sampling.repetition_penalty)
    if not sampling.do_sample or sampling.temperature == 0:
        tokens = scores.argmax(-1)
    else:
        tokens = _draw(scores, sampling, states, positions)
    if not logprobs:
        return Choice(tokens, None)
    return Choice(tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1))


def penalize(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Transformers' RepetitionPenaltyLogitsProcessor: [N, V] fp32, seen [N, V] bool -> [N, V]."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _draw(scores: Tensor, sampling: Sampling, states: Tensor, positions: Tensor) -> Tensor:
    """[N, V] -> [N] int64."""
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    scores, ids = candidates(scores, sampling.top_k, sampling.top_p)
    steps = hash32(states ^ hash32(positions.int() * _GOLDEN))
    noise = hash32(hash32(ids.int() * _GOLDEN) ^ steps[:, None]) & 0x7FFFFFFF
    # 31 bits, which fp32 holds to the last one where u is small and the draw depends on it
    uniform = ((noise.float() + 0.5) * 2.0**-31).clamp_(max=1 - 2.0**-24)
    best = (scores - uniform.neg_().log1p_().neg_().log_()).argmax(-1)
    return ids.expand(len(scores), -1).gather(1, best[:, None]).squeeze(1)


def candidates(scores: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """What Transformers' TopKLogitsWarper and then its TopPLogitsWarper leave.

    Ties with the last of the top k stay, as there.

    Args:
        scores: [N, V] fp32.
        top_k: 0 for all.
    Returns:
        scores [N, W], -inf for what was dropped, and their token ids, [N, W] or [1, W] int64.
    """
    num_tokens = scores.shape[-1]
    ids = torch.arange(num_tokens, device=scores.device)[None]
    if 0 < top_k < num_tokens:
        least = scores.topk(top_k).values[:, -1:]
        kept = scores >= least
        if scores.device.type == "cpu":  # elsewhere the host would wait for the count
            widest = int(kept.sum(-1).max())
            ids = scores.topk(widest).indices.sort().values
            scores = scores.gather(1, ids)
            kept = scores >= least
        scores = scores.masked_fill(~kept, float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(stable=True)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    return scores, ids
