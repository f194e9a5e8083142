"""The load-balancing loss of a mixture of experts: E * sum_e f_e P_e (arXiv:2101.03961), over all layers' tokens.

f_e is the share of (token, choice) pairs that chose expert e, P_e the mean probability of e.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def shared_balance(router_logits: tuple[Tensor, ...], top_k: int, counted: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the loss of tokens that the ranks of a group share; the parts add up to it.

    With n_e choices and probabilities p_t over the N tokens of all ranks, the loss is E * sum_e (n_e / N) (sum_t p_te
    / N). The first factor has no gradient, so it is summed over the ranks; the second is linear in the tokens, so each
    rank adds its own.

    Args:
        router_logits: of each layer [T, E].
        top_k: experts that a token chooses.
        counted: [T] bool, False for tokens that fill a row up.
    Returns:
        scalar fp32.
    """
    logits = torch.stack(router_logits)
    num_experts = logits.shape[-1]
    weights = F.softmax(logits, dim=-1).float() * counted[:, None]
    chosen = F.one_hot(logits.topk(top_k, dim=-1).indices, num_experts).sum(-2) * counted[:, None]
    totals = torch.cat([chosen.sum((0, 1)), counted.sum()[None] * len(logits)]).double()
    dist.all_reduce(totals, group=group)
    tokens = totals[-1].clamp(min=1)
    shares = (totals[:-1] / tokens).float()
    return num_experts * torch.dot(shares, weights.sum((0, 1))) / tokens.float()
