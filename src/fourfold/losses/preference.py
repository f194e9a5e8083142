"""Losses on pairs of answers: the DPO family, and the reference-free ORPO and SimPO.

Every function takes log-probabilities that are already summed over the answers' tokens and returns one number for
each pair, never a mean: the engine adds them up and divides by the pairs of the whole optimizer step.

Legend: P pairs, R rows (answers), N answer tokens of all rows laid end to end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.base.errors import ConfigError

PreferenceKind: TypeAlias = Literal["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo", "robust", "exo", "sppo"]
"""Values of `pref_loss`."""

REFERENCE_FREE: frozenset[str] = frozenset({"orpo", "simpo"})
"""Losses that no reference model takes part in."""
AVERAGED: frozenset[str] = frozenset({"ipo", "orpo", "simpo"})
"""Losses of log-probabilities per token instead of per answer."""
_SMOOTHED = frozenset({"sigmoid", "robust", "exo"})
"""Losses that know of labels the wrong way round."""
_DIVIDED_BY_BETA = frozenset({"ipo", "sppo"})

_EXO_SMOOTHING = 1e-3
"""EXO compares with a distribution that must not be 0 anywhere; stands in for a label smoothing of 0 (TRL 0.24)."""
_LARGEST_LOGP = -1e-7
"""ORPO's odds p / (1 - p) are infinite at p = 1; log-probabilities are held this far from 0."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of both answers of P pairs under one model, summed over the answers' tokens.

    Attributes:
        chosen: [P] fp32.
        rejected: [P] fp32.
    """

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Numbers of answer tokens of P pairs.

    Attributes:
        chosen: [P] int64 or fp32.
        rejected: [P] int64 or fp32.
    """

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True, slots=True)
class PreferenceSettings:
    """Which loss, and its numbers.

    Attributes:
        loss: key `pref_loss`.
        beta: key `pref_beta`, at least 0.
        label_smoothing: key `dpo_label_smoothing`, in [0, 0.5]; the share of pairs taken to be the wrong way round.
        simpo_gamma: key `simpo_gamma`; SimPO's target margin between the answers' rewards.
        bco_weight: key `pref_bco_weight`; weight of the added classifier loss, at least 0.
    Raises:
        ConfigError: for numbers that the loss cannot take.
    """

    loss: PreferenceKind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    bco_weight: float = 0.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.loss in _DIVIDED_BY_BETA and not self.beta:
            problems.append(f"pref_beta: 0 does not go with pref_loss {self.loss}, which divides by it. Raise it.")
        if self.label_smoothing and self.loss not in _SMOOTHED:
            problems.append(
                f"dpo_label_smoothing: {self.label_smoothing:g} has no meaning for pref_loss {self.loss}. "
                f"Set it to 0, or use one of {', '.join(sorted(_SMOOTHED))}."
            )
        if self.loss == "robust" and self.label_smoothing >= 0.5:
            problems.append(
                f"dpo_label_smoothing: {self.label_smoothing:g} leaves pref_loss robust nothing to learn from. "
                "Use less than 0.5."
            )
        if self.bco_weight and self.loss in REFERENCE_FREE:
            problems.append(
                f"pref_bco_weight: {self.bco_weight:g} needs a reference model, which pref_loss {self.loss} has not. "
                "Set it to 0."
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class PreferenceBaselines:
    """What some losses compare with, found over more than one pair; no gradient flows into any of it.

    Attributes:
        bco_delta: scalar, running mean of the rewards seen so far (see RunningMean); needed with a bco_weight.
        chosen_kl: scalar, mean of log pi/pi_ref over chosen answers, for kto_pair; None for that of the given pairs.
        rejected_kl: scalar, the same over rejected answers.
    """

    bco_delta: Tensor | None = None
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PreferenceLosses:
    """One number for each of P pairs.

    Attributes:
        losses: [P] fp32.
        chosen_rewards: [P] fp32, beta * (log pi - log pi_ref), without the reference where the loss has none; of
            averages where the loss is of averages; detached.
        rejected_rewards: [P] fp32, the same of rejected answers.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True, slots=True)
class RunningMean:
    """Mean of everything seen so far, for BCO's delta; small enough to go into a checkpoint.

    Attributes:
        total: sum.
        count: how many numbers it is of.
    """

    total: float = 0.0
    count: int = 0

    def updated(self, total: float, count: int) -> RunningMean:
        """With `count` more numbers whose sum is `total`."""
        return RunningMean(self.total + total, self.count + count)

    @property
    def mean(self) -> float:
        """0 before anything was seen."""
        return self.total / self.count if self.count else 0.0


def index_in_row(rows: Tensor, num_rows: int) -> Tensor:
    """Place of each token within its row's answer.

    Args:
        rows: [N] int64, row of each token; tokens of a row lie next to each other, rows in rising order.
    Returns:
        [N] int64, counted from 0.
    """
    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    return torch.arange(rows.numel(), device=rows.device) - starts.index_select(0, rows)


def length_weights(index: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """LD-DPO's weights: 1 up to the length that both answers of the pair have, alpha beyond.

    Args:
        index: [N] int64, place of each token within its answer, from 0.
        shared: [N] int64, number of tokens of the shorter answer of the token's pair.
        alpha: key `ld_alpha`, in [0, 1]; 1 is plain DPO.
    Returns:
        [N] fp32.
    Source:
        arXiv 2409.06411 (LD-DPO).
    """
    return torch.where(index < shared, 1.0, alpha)


def sum_by_row(token_logps: Tensor, rows: Tensor, num_rows: int, weights: Tensor | None = None) -> Tensor:
    """Weighted sums of token log-probabilities, one for each row.

    LLaMA-Factory weights the policy's log-probabilities by `ld_alpha` and leaves the reference's whole, so that with
    it training does not start at ln 2; TRL 1.16 weights both. The key is LLaMA-Factory's: give `weights` for
    the policy only.

    Args:
        token_logps: [N].
        rows: [N] int64, row of each token.
        weights: [N] from length_weights; None for 1.
    Returns:
        [num_rows] fp32; 0 for a row without tokens.
    """
    logps = token_logps.float() if weights is None else token_logps.float() * weights
    return logps.new_zeros(num_rows).index_add(0, rows, logps)


def chosen_nll(chosen_logps: Tensor, num_tokens: Tensor) -> Tensor:
    """The SFT loss of chosen answers that `pref_ftx` times is added to the preference loss.

    As in LLaMA-Factory it is a mean over the answer's tokens for every loss, and with `ld_alpha` of the weighted sum.

    Args:
        chosen_logps: [P] summed log-probabilities under the policy.
        num_tokens: [P].
    Returns:
        [P] fp32.
    """
    return -_average(chosen_logps, num_tokens)


def preference_loss(
    policy: PairLogps,
    reference: PairLogps | None,
    num_tokens: PairCounts,
    settings: PreferenceSettings,
    baselines: PreferenceBaselines | None = None,
) -> PreferenceLosses:
    """The loss of each pair, as LLaMA-Factory computes it.

    Where its keys and TRL differ, LLaMA-Factory's meaning holds:
    - ipo, orpo and simpo: of log-probabilities divided by the answer's tokens, for losses and rewards; TRL 1.16
      reports ipo's rewards of sums.
    - orpo: the added SFT loss is the mean over the chosen answer alone; TRL's is over prompt and answer, and a mean
      over the tokens of the batch.
    - sigmoid: has label smoothing (conservative DPO), which TRL 1.16 no longer has.
    - exo: a label smoothing of 0 stands for 1e-3; TRL 1.16 refuses it.
    - kto_pair: that of TRL 0.8, which later versions lack, with its baselines held constant as KTO's paper has them.

    Args:
        policy: log-probabilities under the trained model.
        reference: those under the reference, which get no gradient; None for orpo and simpo.
        num_tokens: answer tokens, for losses of averages.
        settings: loss and numbers.
        baselines: needed with a bco_weight.
    """
    baselines = baselines or PreferenceBaselines()
    chosen, rejected = policy.chosen.float(), policy.rejected.float()
    if settings.loss not in REFERENCE_FREE:
        assert reference is not None, f"pref_loss {settings.loss} needs log-probabilities of a reference"
        chosen = chosen - reference.chosen.detach().float()
        rejected = rejected - reference.rejected.detach().float()
    if settings.loss in AVERAGED:
        chosen, rejected = _average(chosen, num_tokens.chosen), _average(rejected, num_tokens.rejected)
    losses = _pair_losses(chosen, rejected, settings, baselines)
    if settings.bco_weight:
        assert baselines.bco_delta is not None, "a bco_weight needs the running mean of rewards"
        bco = bco_loss(settings.beta * chosen, settings.beta * rejected, baselines.bco_delta)
        losses = (losses + settings.bco_weight * bco) / (1 + settings.bco_weight)
    return PreferenceLosses(losses, settings.beta * chosen.detach(), settings.beta * rejected.detach())


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, delta: Tensor) -> Tensor:
    """Loss of a classifier that tells chosen from rejected answers by whether their reward exceeds delta.

    -log sigmoid(r_chosen - delta) - log sigmoid(delta - r_rejected)

    Args:
        chosen_rewards: [P].
        rejected_rewards: [P].
        delta: scalar, mean reward of all answers so far; LLaMA-Factory takes a mean of its micro-batches' means, the
            one at hand included.
    Returns:
        [P] fp32.
    Source:
        arXiv 2404.04656 (BCO).
    """
    delta = delta.detach().float()
    return -F.logsigmoid(chosen_rewards.float() - delta) - F.logsigmoid(delta - rejected_rewards.float())


def _pair_losses(
    chosen: Tensor, rejected: Tensor, settings: PreferenceSettings, baselines: PreferenceBaselines
) -> Tensor:
    """[P] and [P] scores, log pi/pi_ref or log pi -> [P]."""
    beta = settings.beta
    margin = beta * (chosen - rejected)
    match settings.loss:
        case "sigmoid":
            return _mixed(margin, 1 - settings.label_smoothing, settings.label_smoothing)
        case "robust":
            # Unbiased under labels that are wrong with probability e (arXiv 2403.00409).
            share = settings.label_smoothing
            return _mixed(margin, 1 - share, -share) / (1 - 2 * share)
        case "hinge":
            return F.relu(1 - margin)
        case "ipo":
            return (chosen - rejected - 1 / (2 * beta)) ** 2
        case "exo":
            return _exo(margin, settings.label_smoothing or _EXO_SMOOTHING)
        case "sppo":
            # Win probabilities of 1 and 0 (arXiv 2405.00675, equation 4.7).
            return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
        case "kto_pair":
            return _kto_pair(chosen, rejected, beta, baselines)
        case "orpo":
            log_odds = chosen - rejected - (_log_complement(chosen) - _log_complement(rejected))
            return -chosen - beta * F.logsigmoid(log_odds)
        case "simpo":
            return -F.logsigmoid(margin - settings.simpo_gamma)


def _mixed(margin: Tensor, right: float, wrong: float) -> Tensor:
    """-right * log sigmoid(margin) - wrong * log sigmoid(-margin)."""
    losses = -right * F.logsigmoid(margin)
    return losses - wrong * F.logsigmoid(-margin) if wrong else losses


def _exo(margin: Tensor, smoothing: float) -> Tensor:
    """KL from the policy's choice between the two answers to the labels' (arXiv 2402.00856, equation 16)."""
    towards = margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-smoothing))
    away = (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(smoothing))
    return towards + away


def _kto_pair(chosen: Tensor, rejected: Tensor, beta: float, baselines: PreferenceBaselines) -> Tensor:
    """Mean of both answers' KTO losses; the baseline of one kind of answer is estimated on the other kind."""
    chosen_kl = chosen.mean() if baselines.chosen_kl is None else baselines.chosen_kl
    rejected_kl = rejected.mean() if baselines.rejected_kl is None else baselines.rejected_kl
    chosen_losses = (beta * (rejected_kl.detach().clamp(min=0) - chosen)).sigmoid()
    rejected_losses = (beta * (rejected - chosen_kl.detach().clamp(min=0))).sigmoid()
    return (chosen_losses + rejected_losses) / 2


def _average(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """[P] sums and [P] counts -> [P] fp32; 0 for an answer without tokens."""
    return logps.float() / num_tokens.clamp(min=1)


def _log_complement(logps: Tensor) -> Tensor:
    """log(1 - p) of log p."""
    return torch.log(-torch.expm1(logps.clamp(max=_LARGEST_LOGP)))
