"""Rollouts: prompts answered by the model as it is, and what each answer is worth.

Ranks that share a model (tp, pp, cp) have the same prompts and get the same answers; one of them asks for the rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from fourfold.base.errors import FourfoldError
from fourfold.dataset.batch import IGNORE_INDEX, Batch, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.generate.interface import sampling_of
from fourfold.generate.rollout import Completion
from fourfold.models.noise import mix32
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.step import Step
from fourfold.rewards.interface import Rollout
from fourfold.rewards.table import RewardTable, Scores
from fourfold.training.assemble import Parts, pad_token

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Scored:
    """The rollouts of a data-parallel rank in a step, in the order of their prompts.

    Attributes:
        rollouts: as the reward functions saw them.
        scores: what they are worth.
        indices: of the prompts' samples.
    """

    rollouts: list[Rollout]
    scores: Scores
    indices: list[int]

    def __len__(self) -> int:
        return len(self.rollouts)


class RolloutMaker:
    """Answers the prompts of a step and has the answers scored.

    Args:
        copies: answers to each prompt.
    """

    def __init__(self, parts: Parts, rewards: RewardTable, copies: int) -> None:
        run = parts.run
        self._parts, self._rewards, self._copies = parts, rewards, copies
        self._sampling = replace(sampling_of(run), seed=run.training.seed)
        stop, pad = parts.renderer.stop_token_ids, pad_token(parts.tokenizer)
        room = (run.data.cutoff_len + run.generation.max_new_tokens) * run.training.per_device_train_batch_size * copies
        self._engine = parts.built.rollouts(stop_token_ids=stop, pad_token_id=pad, batch_tokens=room)

    def make(self, samples: Sequence[Sample], step: int) -> Scored:
        """Rollouts of this rank's prompts; every rank must call.

        Raises:
            ConfigError: rewards that cannot be had.
        """
        repeated = [sample for sample in samples for _ in range(self._copies)]
        prompts = [sample.sequences["prompt"].input_ids for sample in repeated]
        keys = [mix32(step, sample.index, n % self._copies) for n, sample in enumerate(repeated)]
        answers = self._engine.generate(prompts, self._sampling, keys=keys)
        rollouts = [self._rollout(sample, answer) for sample, answer in zip(repeated, answers, strict=True)]
        scores = from_first(self._parts.mesh, self._score(rollouts) if _is_first(self._parts.mesh) else None)
        if isinstance(scores, FourfoldError):
            raise scores
        assert scores is not None
        return Scored(rollouts, scores, [sample.index for sample in repeated])

    def _rollout(self, sample: Sample, answer: Completion) -> Rollout:
        prompt, reference = sample.sequences["prompt"].input_ids, sample.sequences["reference"].input_ids
        return Rollout(
            prompt=self._text(prompt),
            completion=self._text(answer.tokens),
            reference=self._text(reference) if reference else None,
            prompt_ids=prompt,
            completion_ids=answer.tokens,
            finished=answer.finished,
            extras=sample.extras,
        )

    def _text(self, ids: Sequence[int]) -> str:
        text = self._parts.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _score(self, rollouts: Sequence[Rollout]) -> Scores | FourfoldError:
        if not rollouts:
            return Scores({name: [] for name in self._rewards.names}, [])
        try:
            return self._rewards.score(rollouts)
        except FourfoldError as error:  # told on every rank, so that none waits for another
            return error


def to_sample(
    rollout: Rollout, index: int, numbers: dict[str, Sequence[float]], weight: float, extras: dict[str, float]
) -> Sample:
    """A rollout as it is trained on: the answer's tokens are the targets.

    Args:
        numbers: by name one for each token of the answer.
        weight: of each of them in the loss.
    """
    prompt, answer = list(rollout.prompt_ids), list(rollout.completion_ids)
    before = [0.0] * len(prompt)
    example = Example(
        prompt + answer,
        [IGNORE_INDEX] * len(prompt) + answer,
        weights=before + [weight] * len(answer),
        numbers={name: [*before, *values] for name, values in numbers.items()},
    )
    return Sample({"": example}, index, extras)


def logps_of_answers(
    step: Step, samples: Sequence[Sample], policy: CutPolicy, *, reference: bool, temperature: float
) -> list[list[float]]:
    """For each sample the log-probabilities of its answer's tokens under the model as it is; every rank must call."""
    batches = step.fill(cut(samples, policy))
    found = step.token_logps(batches, reference=reference, temperature=temperature)
    return answer_values(samples, batches, found)


def values_of_answers(step: Step, samples: Sequence[Sample], policy: CutPolicy) -> list[list[float]]:
    """For each sample what the value head says where its answer's tokens are chosen; every rank must call."""
    batches = step.fill(cut(samples, policy))
    return answer_values(samples, batches, step.token_values(batches))


def answer_values(
    samples: Sequence[Sample], batches: Sequence[Batch], values: Sequence[torch.Tensor]
) -> list[list[float]]:
    """For each sample the values [B, S] at the positions that predict its answer's tokens.

    Args:
        batches: made of the samples, each of one document, and of what fills up.
    """
    by_index: dict[int, list[float]] = {}
    lengths = {sample.index: len(sample) for sample in samples}
    for batch, value in zip(batches, values, strict=True):
        targets, documents = batch.targets.reshape(-1), batch.document_ids.reshape(-1)
        flat = value.reshape(-1)
        for number, (index, _) in enumerate(batch.samples):
            if index in lengths and index not in by_index and batch.lengths[number] == lengths[index]:
                chosen = (documents == number) & (targets != IGNORE_INDEX)
                if bool(chosen.any()):
                    by_index[index] = flat[chosen].tolist()
    return [by_index[sample.index] for sample in samples]


def _is_first(mesh: Mesh) -> bool:
    return all(mesh.index(axis) == 0 for axis in ("pp", "cp", "tp"))


def from_first(mesh: Mesh, found: _Found) -> _Found:
    """What the first of the ranks that share a model found, on all of them."""
    for axis in ("tp", "cp", "pp"):
        group = mesh.group((axis,))
        if group is not None:
            box = [found]
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group, device=torch.device("cpu"))
            found = box[0]
    return found
