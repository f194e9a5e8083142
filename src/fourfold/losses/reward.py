"""The loss of reward models on pairs of answers (Bradley-Terry).

Legend: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RewardLosses:
    """One number for each of P pairs.

    Attributes:
        losses: [P] fp32.
        correct: [P] bool, whether the chosen answer's reward is the greater one; equal ones are not correct.
        margins: [P] fp32, reward of the chosen answer less that of the rejected one; detached.
    """

    losses: Tensor
    correct: Tensor
    margins: Tensor


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0) -> RewardLosses:
    """-log sigmoid(r_chosen - r_rejected - margin) + centering * (r_chosen + r_rejected)^2 for each pair.

    Args:
        chosen: [P] rewards of chosen answers, each read at the answer's last token.
        rejected: [P] rewards of rejected answers.
        margin: [P] by how much the chosen answer is to win; None for 0.
        centering: weight of the pull of rewards towards a mean of 0, at least 0.
    Source:
        arXiv 2203.02155, equation 1; the margin is of arXiv 2307.09288, equation 2, the centring of
        arXiv 2312.09244, equation 2. Both are 0 in LLaMA-Factory and options of TRL.
    """
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected
    losses = -F.logsigmoid(difference if margin is None else difference - margin.float())
    if centering:
        losses = losses + centering * (chosen + rejected) ** 2
    margins = difference.detach()
    return RewardLosses(losses, margins > 0, margins)
