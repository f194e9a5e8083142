"""The load-balancing loss of a mixture of experts: E * sum_e f_e P_e (arXiv:2101.03961), over all layers' tokens.

f_e is the share of (token, choice) pairs that chose expert e, P_e the mean probability of e.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The modules from which Transformers takes a model's router logits, by hooks on them."""
    recorded = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    named = [each["router_logits"] for each in recorded if "router_logits" in each]
    specs = [spec for each in named for spec in (each if isinstance(each, list) else [each])]
    kinds = tuple({getattr(spec, "target_class", None) or spec for spec in specs})
    return [module for module in model.modules() if isinstance(module, kinds)]


def balance_sums(
    router_logits: tuple[Tensor, ...], top_k: int, counted: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """What some layers add to the sums that the loss of all is made of (see `balance`).

    Args:
        router_logits: of each layer [T, E].
        top_k: experts that a token chooses.
        counted: [T] bool, False for tokens that fill a row up.
        group: ranks that share the tokens, over which choices and tokens are added up; None for one.
    Returns:
        [2 E + 1] fp32: probabilities of each expert, choices of each, and layers x tokens; only the first has a
        gradient.
    """
    logits = torch.stack(router_logits)
    num_experts = logits.shape[-1]
    weights = F.softmax(logits, dim=-1).float() * counted[:, None]
    chosen = F.one_hot(logits.topk(top_k, dim=-1).indices, num_experts).sum(-2) * counted[:, None]
    totals = torch.cat([chosen.sum((0, 1)), counted.sum()[None] * len(logits)]).double()
    if group is not None:
        dist.all_reduce(totals, group=group)
    return torch.cat([weights.sum((0, 1)), totals.float()])


def balance(sums: Tensor) -> Tensor:
    """The loss of what `balance_sums` counted, added up over layers; this rank's part where ranks share the tokens.

    With n_e choices and probabilities p_t over the N tokens of all layers and ranks, the loss is
    E * sum_e (n_e / N) (sum_t p_te / N). The first factor has no gradient, so it is summed over the ranks; the second
    is linear in the tokens, so each rank adds its own.
    """
    num_experts = len(sums) // 2
    weights, chosen, tokens = sums.split([num_experts, num_experts, 1])
    count = tokens.detach().clamp(min=1)
    return (num_experts * torch.dot(chosen.detach() / count, weights) / count).squeeze(0)
