"""KTO: a loss on single answers, each tagged as desirable or not.

An answer's value is how far its reward exceeds a baseline z0, the policy's mean KL from the reference. z0 is estimated
on answers that belong to other prompts (the KL rows) and is one number for the whole optimizer step, so the caller
adds up `kl_sum` over micro-batches and ranks before any loss is computed.

Legend: N answers, K KL rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KtoSettings:
    """The loss's numbers.

    Attributes:
        beta: key `pref_beta`, at least 0.
        desirable_weight: key `kto_chosen_weight`, at least 0.
        undesirable_weight: key `kto_rejected_weight`, at least 0.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class KtoLosses:
    """One number for each of N answers.

    Attributes:
        losses: [N] fp32, weighted.
        rewards: [N] fp32, beta * (log pi - log pi_ref); detached.
    """

    losses: Tensor
    rewards: Tensor


def kl_sum(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Summand of z0 for some of the KL rows.

    Args:
        logps: [K] summed log-probabilities of the KL rows under the policy.
        reference_logps: [K] the same under the reference.
    Returns:
        scalar fp32, detached.
    """
    return (logps.detach().float() - reference_logps.detach().float()).sum()


def kl_baseline(total: Tensor, count: Tensor | float) -> Tensor:
    """z0 of the sum over all KL rows of the step: their mean, but not below 0; 0 where there are none.

    LLaMA-Factory and TRL average each micro-batch on its own, so their z0 depends on how a step is cut; with one
    micro-batch a step it is this number.

    Args:
        total: scalar, kl_sum added up.
        count: number of rows it is of.
    Returns:
        scalar fp32, detached.
    """
    return (total.detach().float() / max(float(count), 1.0)).clamp(min=0)


def kto_loss(
    logps: Tensor, reference_logps: Tensor, desirable: Tensor, baseline: Tensor, settings: KtoSettings
) -> KtoLosses:
    """The loss of each answer.

    With r = log pi - log pi_ref:  w_d * (1 - sigmoid(beta * (r - z0)))  for desirable answers,
    w_u * (1 - sigmoid(beta * (z0 - r)))  for the others.

    Args:
        logps: [N] log-probabilities under the policy, summed over the answers' tokens.
        reference_logps: [N] the same under the reference; gets no gradient.
        desirable: [N] bool.
        baseline: scalar z0; gets no gradient, and below 0 counts as 0.
    Source:
        arXiv 2402.01306 (KTO); TRL's KTOTrainer, which LLaMA-Factory uses.
    """
    ratios = logps.float() - reference_logps.detach().float()
    excess = settings.beta * (ratios - baseline.detach().float().clamp(min=0))
    losses = torch.where(
        desirable, settings.desirable_weight * (-excess).sigmoid(), settings.undesirable_weight * excess.sigmoid()
    )
    return KtoLosses(losses, settings.beta * ratios.detach())
