"""Preference optimisation on pairs of answers: DPO and its relatives (`pref_loss`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fourfold.config.schema import Run
from fourfold.dataset.batch import IGNORE_INDEX, Batch, to_device
from fourfold.losses.documents import (
    COUNTS,
    PAIRS,
    REFERENCE,
    count_targets,
    pairs_tensor,
    reference_logps,
    stores_reference,
)
from fourfold.losses.preference import (
    AVERAGED,
    REFERENCE_FREE,
    PairCounts,
    PairLogps,
    PreferenceBaselines,
    PreferenceSettings,
    RunningMean,
    chosen_nll,
    length_weights,
    preference_loss,
)
from fourfold.losses.token import router_term
from fourfold.objectives.interface import Objective
from fourfold.parallel.loss import Outputs, document_logps, loss_share
from fourfold.parallel.step import Scorer
from fourfold.parallel.terms import TOKENS, LossTerms, Term

_ROLES = ("chosen", "rejected")


@dataclass
class PreferenceObjective:
    """The mean loss of the step's pairs.

    Attributes:
        sft_weight: of the chosen answer's own loss (`pref_ftx`).
        long_weight: of the policy's tokens beyond the shorter answer's length (`ld_alpha`); None for 1.
        stored: the reference's log-probabilities come with the samples.
        router_coefficient: weight of the experts' load-balancing loss.
        seen: rewards of the steps before, for `pref_bco_weight`.
    """

    settings: PreferenceSettings
    sft_weight: float = 0.0
    long_weight: float | None = None
    stored: bool = False
    router_coefficient: float = 0.0
    seen: RunningMean = field(default_factory=RunningMean)
    _baselines: PreferenceBaselines = field(default_factory=PreferenceBaselines)

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """Pairs, token counts and the reference's log-probabilities; for some losses the policy's own as well."""
        ready = [self._with_pairs(batch) for batch in batches]
        if self.settings.loss in REFERENCE_FREE:
            return ready
        found = reference_logps(batches, _ROLES, scorer, stored=self.stored)
        ready = [
            replace(batch, extras={**batch.extras, REFERENCE: logps[to_device(batch.extras[PAIRS], logps.device)]})
            for batch, logps in zip(ready, found, strict=True)
        ]
        if self.settings.loss == "kto_pair" or self.settings.bco_weight:
            self._baselines = self._measure(ready, scorer)
        return ready

    def _with_pairs(self, batch: Batch) -> Batch:
        pairs, counts = pairs_tensor(batch), count_targets(batch)
        extras = {**batch.extras, PAIRS: pairs, COUNTS: counts[pairs]}
        weights = batch.weights
        if self.long_weight is not None:
            weights = weights * _weights_by_length(batch, pairs, counts, self.long_weight)
        return replace(batch, extras=extras, weights=weights)

    def _measure(self, batches: Sequence[Batch], scorer: Scorer) -> PreferenceBaselines:
        """Means of log pi/pi_ref over the pairs of the whole step, before it is trained."""
        found = scorer.document_logps(batches, reference=False)
        ratios = [
            logps.cpu()[batch.extras[PAIRS]] - batch.extras[REFERENCE].cpu()
            for logps, batch in zip(found, batches, strict=True)
        ]  # fmt: skip
        chosen, rejected = torch.cat(ratios).double().sum(0).tolist()
        sums = scorer.reducer.counts({"chosen": chosen, "rejected": rejected, PAIRS: float(sum(map(len, ratios)))})
        number = max(sums[PAIRS], 1.0)
        delta = None
        if self.settings.bco_weight:
            beta = self.settings.beta
            if torch.is_grad_enabled():  # an evaluation leaves no trace
                total = beta * (sums["chosen"] + sums["rejected"]) / 2
                self.seen = self.seen.updated(total, round(number))
            delta = torch.tensor(self.seen.mean)
        means = (torch.tensor(sums[role] / number, dtype=torch.float32) for role in _ROLES)
        return PreferenceBaselines(delta, *means)

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The number of pairs, and of tokens."""
        return {
            PAIRS: float(sum(len(batch.extras[PAIRS]) for batch in batches)),
            TOKENS: float(sum(batch.num_tokens for batch in batches)),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The terms `preference` and, if asked for, `sft` and `router`; rewards and log-probabilities as metrics."""
        pairs, counts = batch.extras[PAIRS], batch.extras[COUNTS]
        logps = document_logps(outputs, batch, None if self.long_weight is None else batch.weights)[pairs]
        policy, number = PairLogps(*logps.unbind(1)), PairCounts(*counts.unbind(1))
        reference = PairLogps(*batch.extras[REFERENCE].unbind(1)) if REFERENCE in batch.extras else None
        baselines = _on(self._baselines, logps.device)
        found = preference_loss(policy, reference, number, self.settings, baselines)
        share = loss_share(outputs)
        terms = {"preference": Term(found.losses.sum() * share, PAIRS)}
        if self.sft_weight:
            nll = chosen_nll(policy.chosen, number.chosen)
            terms["sft"] = Term(self.sft_weight * nll.sum() * share, PAIRS)
        terms |= router_term(outputs, batch, self.router_coefficient)
        shown = logps.detach() / counts if self.settings.loss in AVERAGED else logps.detach()
        margins = found.chosen_rewards - found.rejected_rewards
        metrics = {
            "rewards/chosen": found.chosen_rewards,
            "rewards/rejected": found.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (1 + margins.sign()) / 2,  # without a preference it is right half of the time
            "logps/chosen": shown[:, 0],
            "logps/rejected": shown[:, 1],
        }
        return LossTerms(terms, {name: Term(each.sum() * share, PAIRS) for name, each in metrics.items()})


def _weights_by_length(batch: Batch, pairs: Tensor, counts: Tensor, alpha: float) -> Tensor:
    """[B, S] fp32: LD-DPO's weights of a whole micro-batch's targets."""
    trained = batch.targets != IGNORE_INDEX
    shared = torch.zeros(len(batch.lengths))
    shared[pairs] = counts[pairs].amin(1, keepdim=True).expand(-1, 2)
    documents = batch.document_ids.clamp(min=0).long()
    before = trained.reshape(-1).cumsum(0).reshape(trained.shape) - trained.long()
    first = torch.full((len(batch.lengths),), trained.numel())
    first.scatter_reduce_(0, documents[trained], before[trained], "amin")
    return length_weights(before - first[documents], shared[documents], alpha)


def _on(baselines: PreferenceBaselines, device: torch.device) -> PreferenceBaselines:
    def there(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    return PreferenceBaselines(
        there(baselines.bco_delta), there(baselines.chosen_kl), there(baselines.rejected_kl)
    )  # fmt: skip


def build(run: Run) -> Objective:
    """The objective of stage `dpo`.

    Raises:
        ConfigError: numbers that the loss cannot take.
    """
    keys = run.preference
    settings = PreferenceSettings(
        loss=keys.pref_loss,
        beta=keys.pref_beta,
        label_smoothing=keys.dpo_label_smoothing,
        simpo_gamma=keys.simpo_gamma,
        bco_weight=keys.pref_bco_weight,
    )
    return PreferenceObjective(
        settings,
        sft_weight=keys.pref_ftx,
        long_weight=keys.ld_alpha,
        stored=keys.pref_loss not in REFERENCE_FREE and stores_reference(run),
        router_coefficient=run.model.moe_aux_loss_coef or 0.0,
    )
