"""KTO: learning from single answers that are tagged as desirable or not (arXiv 2402.01306)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.dataset.collate import without_targets
from fourfold.losses.documents import PAIRS, REFERENCE, count_targets, pairs_tensor, reference_logps, stores_reference
from fourfold.losses.kto import KtoSettings, kl_baseline, kto_loss
from fourfold.losses.preference import chosen_nll
from fourfold.losses.token import router_term
from fourfold.objectives.interface import Objective
from fourfold.parallel.loss import Outputs, document_logps, loss_share
from fourfold.parallel.step import Scorer
from fourfold.parallel.terms import TOKENS, LossTerms, Term

_ROLES = ("response", "kl")
_DESIRABLE, _UNDESIRABLE = "desirable", "undesirable"
_COUNT = "count"


@dataclass
class KtoObjective:
    """The mean loss of the step's answers, against a baseline that is estimated on the whole step's KL rows.

    Attributes:
        sft_weight: of the desirable answers' own loss (`pref_ftx`).
        stored: the reference's log-probabilities come with the samples.
        router_coefficient: weight of the experts' load-balancing loss.
    """

    settings: KtoSettings
    sft_weight: float = 0.0
    stored: bool = False
    router_coefficient: float = 0.0
    _baseline: Tensor = field(default_factory=lambda: torch.zeros(()))

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """The reference's log-probabilities, and the step's baseline; KL rows are not trained."""
        reference = reference_logps(batches, _ROLES, scorer, stored=self.stored)
        policy = scorer.document_logps(batches, reference=False)
        ready, total, number = [], 0.0, 0
        for batch, before, now in zip(batches, map(Tensor.cpu, reference), map(Tensor.cpu, policy), strict=True):
            pairs = pairs_tensor(batch)
            kl_rows = pairs[:, 1]
            total += float((now[kl_rows] - before[kl_rows]).double().sum())
            number += len(kl_rows)
            answers = pairs[:, 0]
            desirable = batch.extras.get(_DESIRABLE, torch.zeros(len(batch.lengths)))[answers]
            extras = {
                PAIRS: pairs,
                REFERENCE: before[answers],
                _DESIRABLE: desirable,
                _COUNT: count_targets(batch)[answers],
            }
            untrained = without_targets(batch, kl_rows.tolist())
            ready.append(replace(untrained, extras={**batch.extras, **extras}))
        sums = scorer.reducer.counts({"kl": total, PAIRS: float(number)})
        self._baseline = kl_baseline(torch.tensor(sums["kl"]), sums[PAIRS])
        return ready

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The numbers of answers, of the desirable ones and of the others, and of tokens."""
        desirable = sum(float(batch.extras[_DESIRABLE].sum()) for batch in batches)
        number = float(sum(len(batch.extras[PAIRS]) for batch in batches))
        return {
            PAIRS: number,
            _DESIRABLE: desirable,
            _UNDESIRABLE: number - desirable,
            TOKENS: float(sum(batch.num_tokens for batch in batches)),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The terms `preference` and, if asked for, `sft` and `router`; rewards and log-probabilities as metrics."""
        logps = document_logps(outputs, batch)[batch.extras[PAIRS][:, 0]]
        desirable = batch.extras[_DESIRABLE] > 0
        baseline = self._baseline.to(logps.device)
        found = kto_loss(logps, batch.extras[REFERENCE], desirable, baseline, self.settings)
        share = loss_share(outputs)
        terms = {"preference": Term(found.losses.sum() * share, PAIRS)}
        if self.sft_weight:
            nll = chosen_nll(logps, batch.extras[_COUNT])[desirable]
            terms["sft"] = Term(self.sft_weight * nll.sum() * share, _DESIRABLE)
        terms |= router_term(outputs, batch, self.router_coefficient)
        metrics = {"kl": Term(baseline * (len(logps) * share), PAIRS)}
        for word, denominator, those in (("chosen", _DESIRABLE, desirable), ("rejected", _UNDESIRABLE, ~desirable)):
            metrics[f"rewards/{word}"] = Term(found.rewards[those].sum() * share, denominator)
            metrics[f"logps/{word}"] = Term(logps.detach()[those].sum() * share, denominator)
        return LossTerms(terms, metrics)


def build(run: Run) -> Objective:
    """The objective of stage `kto`."""
    keys = run.preference
    return KtoObjective(
        KtoSettings(keys.pref_beta, keys.kto_chosen_weight, keys.kto_rejected_weight),
        sft_weight=keys.pref_ftx,
        stored=stores_reference(run),
        router_coefficient=run.model.moe_aux_loss_coef or 0.0,
    )
