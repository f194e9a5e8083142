"""What a reinforcement stage does in a step of the loop: rollouts, advantages, and the samples of its updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from fourfold.dataset.batch import Sample
from fourfold.dataset.collate import CutPolicy
from fourfold.dataset.loader import StepSamples
from fourfold.losses.advantages import (
    KlController,
    RunningMoments,
    estimate_advantages,
    group_advantages,
    moment_sums,
    overlong_penalty,
    token_rewards,
    whiten,
)
from fourfold.losses.policy import kl_estimate
from fourfold.objectives.grpo import ADVANTAGES, OLD_LOGPS, REFERENCE_LOGPS, ROLLOUTS
from fourfold.objectives.ppo import OLD_VALUES, RETURNS
from fourfold.parallel.reduce import Reducer
from fourfold.parallel.step import Step
from fourfold.rewards.table import Scores
from fourfold.training.rollouts import RolloutMaker, Scored, logps_of_answers, to_sample, values_of_answers


@dataclass
class Practised:
    """What a step of practice came to.

    Attributes:
        updates: the samples of each update of the weights, on this data-parallel rank.
        figures: of the rollouts, over all ranks.
        table: some of this rank's rollouts with their rewards.
    """

    updates: list[list[Sample]]
    figures: dict[str, float] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)


class Practice(Protocol):
    """Turns the prompts of a step into what is trained on."""

    def practise(self, found: StepSamples) -> Practised:
        """Every rank must call, also one without prompts."""
        ...

    def state(self) -> dict[str, float]:
        """What a resumed run must go on with."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with what `state` gave."""
        ...


@dataclass
class GroupPractice:
    """Groups of answers to each prompt, each compared with its group (GRPO and its variants).

    Attributes:
        copies: answers of a group.
        scaling: what advantages are divided by, see `losses/advantages.py`.
        per_answer: an answer weighs as much as any other, whatever its length (grpo, gspo).
        updates: passes over the rollouts.
        mask_truncated: nothing is learnt from answers that were cut off.
        overlong: tokens before the longest answer over which the reward falls; None for no such penalty.
        longest: tokens of an answer at most.
        reference: runs the reference where the KL counts: the engine, and whether adapters are off; None without.
        shown: rollouts in the table.
    """

    maker: RolloutMaker
    step: Step
    policy: CutPolicy
    reducer: Reducer
    copies: int
    scaling: Any
    per_answer: bool
    updates: int
    temperature: float
    mask_truncated: bool = False
    overlong: int | None = None
    longest: int = 0
    reference: tuple[Step, bool] | None = None
    shown: int = 4

    def practise(self, found: StepSamples) -> Practised:
        """One update for each pass over the rollouts."""
        scored = self.maker.make(found.samples, found.step)
        totals = torch.tensor(scored.scores.total, dtype=torch.float32)
        if self.overlong is not None and len(scored):
            lengths = torch.tensor([len(rollout.completion_ids) for rollout in scored.rollouts])
            totals = totals + overlong_penalty(lengths, self.longest, self.overlong)
        groups = torch.arange(len(scored)) // self.copies
        compared = group_advantages(totals, groups, len(found.samples), self.scaling)
        samples = [self._sample(scored, number, float(a)) for number, a in enumerate(compared.advantages)]
        if self.updates > 1:
            samples = self._with(samples, OLD_LOGPS, self.step, off=False)
        if self.reference is not None:
            engine, off = self.reference
            samples = self._with(samples, REFERENCE_LOGPS, engine, off=off)
        figures = self._figures(scored, totals, compared.no_spread)
        advantages = compared.advantages.tolist()
        return Practised([samples] * self.updates, figures, table_of(scored, advantages, self.shown))

    def state(self) -> dict[str, float]:
        """Nothing lasts from step to step."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Nothing is to be restored."""

    def _sample(self, scored: Scored, number: int, advantage: float) -> Sample:
        rollout = scored.rollouts[number]
        size = len(rollout.completion_ids)
        weight = 1.0 / size if self.per_answer else 1.0
        if self.mask_truncated and not rollout.finished:
            weight = 0.0
        index = scored.indices[number] * self.copies + number % self.copies
        return to_sample(rollout, index, {ADVANTAGES: [advantage] * size}, weight, {ROLLOUTS: 1.0})

    def _with(self, samples: Sequence[Sample], name: str, engine: Step, *, off: bool) -> list[Sample]:
        """The samples with log-probabilities of their answers' tokens."""
        found = logps_of_answers(engine, samples, self.policy, reference=off, temperature=self.temperature)
        return [with_numbers(sample, name, values) for sample, values in zip(samples, found, strict=True)]

    def _figures(self, scored: Scored, totals: torch.Tensor, no_spread: torch.Tensor) -> dict[str, float]:
        found = rollout_figures(scored, totals, self.reducer)
        counted = self.reducer.counts({"same": float(no_spread.sum()), "groups": float(len(no_spread))})
        return {**found, "groups_without_spread": counted["same"] / max(counted["groups"], 1.0)}


def with_numbers(sample: Sample, name: str, values: Sequence[float]) -> Sample:
    """A sample with another number for each token of its answer."""
    [(role, example)] = sample.sequences.items()
    before = [0.0] * (len(example) - len(values))
    grown = replace(example, numbers={**example.numbers, name: [*before, *values]})
    return replace(sample, sequences={role: grown})


def rollout_figures(scored: Scored, totals: torch.Tensor, reducer: Reducer) -> dict[str, float]:
    """Means over all ranks: the rewards, by function and in all, and the answers' lengths and ends."""
    scores: Scores = scored.scores
    sums: dict[str, float] = {
        "rollouts": float(len(scored)),
        "response_length": float(sum(len(rollout.completion_ids) for rollout in scored.rollouts)),
        "truncated": float(sum(not rollout.finished for rollout in scored.rollouts)),
    }
    values = {"reward": totals.tolist(), **{f"rewards/{name}": found for name, found in scores.by_name.items()}}
    for name, found in values.items():
        known = [value for value in found if not math.isnan(value)]
        sums[name], sums[f"{name}#"] = math.fsum(known), float(len(known))
    known = [value for value in values["reward"] if not math.isnan(value)]
    sums["squares"] = math.fsum(value * value for value in known)
    sums = reducer.counts(sums)
    count = max(sums["rollouts"], 1.0)
    figures = {name: sums[name] / max(sums[f"{name}#"], 1.0) for name in values}
    spread = sums["squares"] / max(sums["reward#"], 1.0) - figures["reward"] ** 2
    figures["reward_std"] = math.sqrt(max(spread, 0.0))
    figures["response_length"] = sums["response_length"] / count
    figures["truncated"] = sums["truncated"] / count
    return figures


def table_of(scored: Scored, advantages: Sequence[float], shown: int) -> list[dict[str, Any]]:
    """The first rollouts with their rewards."""
    rows = []
    for number, rollout in enumerate(scored.rollouts[:shown]):
        rewards = {f"rewards/{name}": found[number] for name, found in scored.scores.by_name.items()}
        rows.append(
            {
                "prompt": rollout.prompt,
                "completion": rollout.completion,
                "reward": scored.scores.total[number],
                **rewards,
                "advantage": advantages[number],
            }
        )
    return rows


@dataclass
class PpoPractice:
    """Rollouts whose tokens are judged by rewards, the KL from the reference and the value head (PPO).

    Attributes:
        epochs: passes over the rollouts; each cuts them into `parts` updates.
        normalise: scores are divided by the deviation of all so far.
        whiten_rewards: tokens' rewards are scaled to a variance of 1.
        controller: weight of the KL penalty.
        moments: of all scores so far.
    """

    maker: RolloutMaker
    step: Step
    policy: CutPolicy
    reducer: Reducer
    reference: tuple[Step, bool]
    epochs: int
    parts: int
    temperature: float
    normalise: bool
    whiten_rewards: bool
    controller: KlController
    shown: int = 4
    moments: RunningMoments = field(default_factory=RunningMoments)

    def practise(self, found: StepSamples) -> Practised:
        """`epochs` times `parts` updates."""
        scored = self.maker.make(found.samples, found.step)
        bare = [
            to_sample(rollout, index, {}, 1.0, {})
            for rollout, index in zip(scored.rollouts, scored.indices, strict=True)
        ]
        old = logps_of_answers(self.step, bare, self.policy, reference=False, temperature=self.temperature)
        engine, off = self.reference
        reference = logps_of_answers(engine, bare, self.policy, reference=off, temperature=self.temperature)
        values = values_of_answers(self.step, bare, self.policy)
        mask, (old_rows, reference_rows, value_rows) = _padded(old, reference, values)
        kl = kl_estimate(old_rows, reference_rows, "k1")
        totals = torch.tensor(scored.scores.total, dtype=torch.float32)
        rewards = token_rewards(self._normalised(totals), kl, mask, self.controller.value)
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, self._everywhere(moment_sums(rewards, mask)), shift_mean=False)
        estimated = estimate_advantages(rewards, value_rows, mask)
        sums = self._everywhere(moment_sums(estimated.advantages, mask))
        advantages = whiten(estimated.advantages, mask, sums)
        samples = []
        for n, sample in enumerate(bare):
            size = len(old[n])
            numbers = {
                OLD_LOGPS: old[n],
                OLD_VALUES: values[n],
                ADVANTAGES: advantages[n][:size].tolist(),
                RETURNS: estimated.returns[n][:size].tolist(),
            }
            samples.append(self._sample(sample, numbers))
        figures = {**rollout_figures(scored, totals, self.reducer), "kl_weight": self.controller.value}
        figures["kl"] = self._mean_kl(kl, mask)
        self.controller = self.controller.updated(figures["kl"], found.num_samples)
        size = max(math.ceil(len(samples) / self.parts), 1)
        updates = [samples[k * size : (k + 1) * size] for k in range(self.parts)] * self.epochs
        first = [float(row[: len(old[n])].mean()) for n, row in enumerate(advantages)]
        return Practised(updates, figures, table_of(scored, first, self.shown))

    def _normalised(self, totals: torch.Tensor) -> torch.Tensor:
        """Scores as the rewards take them: without a score nothing is added."""
        known = ~totals.isnan()
        present = torch.where(known, totals, 0.0)
        if self.normalise:
            self.moments = self.moments.updated(self._everywhere(moment_sums(present, known)))
            present = torch.where(known, self.moments.normalised(present), 0.0)
        return present

    def _everywhere(self, sums: torch.Tensor) -> torch.Tensor:
        names = [str(number) for number in range(len(sums))]
        found = self.reducer.counts(dict(zip(names, sums.tolist(), strict=True)))
        return torch.tensor([found[name] for name in names], dtype=torch.float64)

    def _mean_kl(self, kl: torch.Tensor, mask: torch.Tensor) -> float:
        """Nats of a rollout, over all ranks."""
        sums = self.reducer.counts({"kl": float((kl * mask).double().sum()), "rollouts": float(len(mask))})
        return sums["kl"] / max(sums["rollouts"], 1.0)

    @staticmethod
    def _sample(sample: Sample, numbers: dict[str, list[float]]) -> Sample:
        for name, values in numbers.items():
            sample = with_numbers(sample, name, values)
        return sample

    def state(self) -> dict[str, float]:
        """What a resumed run must go on with."""
        moments = self.moments
        return {
            "kl_weight": self.controller.value, "total": moments.total, "square_total": moments.square_total,
            "count": moments.count,
        }  # fmt: skip

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with what `state` gave."""
        if state:
            self.controller = replace(self.controller, value=state["kl_weight"])
            self.moments = RunningMoments(state["total"], state["square_total"], state["count"])


def _padded(*found: Sequence[Sequence[float]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Lists of rows of uneven lengths, all alike -> mask [B, T] bool, and each as [B, T] fp32 with zeros behind."""
    lengths = [len(row) for row in found[0]]
    width = max(lengths, default=0)
    mask = torch.arange(width)[None] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    rows = [torch.zeros(len(lengths), width) for _ in found]
    for table, values in zip(rows, found, strict=True):
        for number, row in enumerate(values):
            table[number, : len(row)] = torch.tensor(row)
    return mask, rows
