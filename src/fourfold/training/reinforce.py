"""Putting a reinforcement stage together: rewards, the engine that answers, and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from fourfold.base.log import get_logger
from fourfold.config.second import REFERENCE_KEYS, reference_run, reward_keys, reward_run
from fourfold.dataset.collate import filler
from fourfold.generate.interface import policy_temperature
from fourfold.losses.advantages import KlController
from fourfold.losses.documents import begins_as_base
from fourfold.losses.token import TokenLoss
from fourfold.models.scorer import RewardScorer
from fourfold.models.value_head import check_value_head
from fourfold.parallel.step import Step
from fourfold.rewards.build import build_rewards
from fourfold.rewards.table import RewardTable
from fourfold.training.assemble import Parts
from fourfold.training.frozen import build_frozen, named_as
from fourfold.training.practice import GroupPractice, PpoPractice, Practice
from fourfold.training.rollouts import RolloutMaker

log = get_logger(__name__)


def build_practice(parts: Parts, step: Step) -> Practice | None:
    """What the run's stage does in a step before it trains; None for stages that train on their data.

    Raises:
        ConfigError: rewards that cannot be had, or a model that cannot answer while it is trained.
    """
    made = {"grpo": _group_practice, "ppo": _ppo_practice}.get(parts.run.training.stage)
    return None if made is None else made(parts, step)


def _group_practice(parts: Parts, step: Step) -> GroupPractice:
    run = parts.run
    keys, generation = run.reinforcement, run.generation
    variant = keys.grpo_variant
    maker = RolloutMaker(parts, _rewards(parts), keys.num_generations)
    return GroupPractice(
        maker=maker,
        step=step,
        policy=parts.policy,
        reducer=parts.split.reducer,
        copies=keys.num_generations,
        scaling=keys.scale_rewards or "group",
        per_answer=variant in ("grpo", "gspo"),
        updates=keys.num_iterations,
        temperature=policy_temperature(run),
        mask_truncated=keys.mask_truncated_completions,
        overlong=keys.overlong_buffer,
        longest=generation.max_new_tokens,
        reference=reference_of(parts, step) if keys.kl_weight else None,
        shown=keys.log_completions,
    )


def _ppo_practice(parts: Parts, step: Step) -> PpoPractice:
    run, keys = parts.run, parts.run.preference
    return PpoPractice(
        maker=RolloutMaker(parts, _rewards(parts), 1),
        step=step,
        policy=parts.policy,
        reducer=parts.split.reducer,
        reference=reference_of(parts, step),
        epochs=keys.ppo_epochs,
        parts=keys.ppo_buffer_size,
        temperature=policy_temperature(run),
        normalise=keys.ppo_score_norm,
        whiten_rewards=keys.ppo_whiten_rewards,
        controller=KlController(target=keys.ppo_target),
        shown=run.reinforcement.log_completions,
    )


class _LateScorer:
    """A reward model that is loaded whole by the rank that asks it, when it does."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._found: RewardScorer | None = None

    def __call__(self, token_ids: Sequence[Sequence[int]]) -> list[float]:
        if self._found is None:
            run, parts = reward_run(self._parts.run), self._parts
            dtype = parts.built.precision.compute
            with named_as(reward_keys(parts.run)):
                self._found = RewardScorer.load(run, parts.mesh.device, tokenizer=parts.tokenizer, dtype=dtype)
        return self._found.score(token_ids)


def _rewards(parts: Parts) -> RewardTable:
    keys = parts.run.preference
    if keys.reward_model and keys.reward_model_type != "api":
        check_value_head(reward_run(parts.run).model, "reward_model")
    return build_rewards(parts.run, _LateScorer(parts))


def reference_of(parts: Parts, step: Step) -> tuple[Step, bool]:
    """What runs the reference: the model itself with its adapters off, or a second one that never changes.

    Returns:
        the engine, and whether adapters are to be off.
    """
    if parts.run.preference.ref_model is None and begins_as_base(parts.run):
        return step, True
    frozen = reference_run(parts.run)
    log.info("Reference model: %s, held beside the one that is trained", frozen.model.model_name_or_path)
    with named_as(REFERENCE_KEYS) if parts.run.preference.ref_model else nullcontext():
        built = build_frozen(frozen, parts.mesh, parts.tokenizer)
    return built.step(TokenLoss(), lambda: filler(parts.policy)), False
