"""How many steps a run has, and the learning rate of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from fourfold.base.errors import ConfigError
from fourfold.config.training import TrainingConfig

FOLLOW_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that move with the evaluation's result; `make_scheduler` gives them no steps."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The length of a run.

    Attributes:
        samples_per_step: samples of one optimizer step over all data-parallel ranks.
        steps_per_epoch: optimizer steps of one epoch (the last one may be smaller).
        max_steps: optimizer steps of the run.
        warmup_steps: of these, steps of rising learning rate.
    """

    samples_per_step: int
    steps_per_epoch: int
    max_steps: int
    warmup_steps: int

    @property
    def num_epochs(self) -> int:
        """Epochs begun by the end of the run."""
        return math.ceil(self.max_steps / self.steps_per_epoch)


def plan_steps(training: TrainingConfig, num_samples: int, dp_size: int = 1, *, buffer: int = 1) -> Budget:
    """Steps of a run, counted as Transformers' Trainer counts them.

    Args:
        num_samples: samples of the training set; 0 when it is a stream (max_steps is set then).
        dp_size: data-parallel ranks.
        buffer: batches of samples that a step of the loop takes together (`ppo_buffer_size`).
    """
    per_step = samples_per_step(training, dp_size) * buffer
    steps_per_epoch = math.ceil(num_samples / per_step) if num_samples else training.max_steps
    max_steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    warmup = training.warmup_steps if training.warmup_steps > 0 else math.ceil(training.warmup_ratio * max_steps)
    return Budget(per_step, steps_per_epoch, max_steps, int(warmup))


def samples_per_step(training: TrainingConfig, dp_size: int = 1) -> int:
    """Samples of one optimizer step: `global_batch_size`, or micro-batch times accumulation times ranks."""
    if training.global_batch_size is not None:
        return training.global_batch_size
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * dp_size


def make_scheduler(
    training: TrainingConfig, optimizer: torch.optim.Optimizer, budget: Budget
) -> torch.optim.lr_scheduler.LRScheduler:
    """Transformers' schedule of that name; stepping it once a step gives step 0 the first rate (0 under warm-up).

    Raises:
        ConfigError: the schedule does not take `lr_scheduler_kwargs`.
    """
    given = dict(training.lr_scheduler_kwargs)
    try:
        return get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=budget.warmup_steps,
            num_training_steps=budget.max_steps,
            scheduler_specific_kwargs=given,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_kwargs: {given} does not go with lr_scheduler_type: {training.lr_scheduler_type} ({error}). "
            "Correct or remove it."
        ) from error


_OF_GROUPS = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "_init_lrs", "_last_lr")
"""Entries of a schedule's state that are lists of one entry for each group of parameters."""


def restore_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, state: Mapping[str, Any]) -> None:
    """Put a schedule's position back, after its optimizer's state.

    Its rates are this run's, since its length or height may have been changed; and this rank may have other groups of
    parameters than the one whose `state` it is (stages of a pipeline need not have all).
    """
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        for group, base, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * share(state["last_epoch"])
    own = {**scheduler.state_dict(), "_last_lr": [group["lr"] for group in groups]}
    scheduler.load_state_dict({**state, **{key: own[key] for key in _OF_GROUPS if key in state}})


@dataclass(frozen=True, slots=True)
class Cadence:
    """When something that happens now and then is due.

    Attributes:
        every: steps between two times; 0 for never.
        at_end: whether the run's last step counts, too.
        at_first: whether the first step counts, too.
        after: it is never due before so many steps.
    """

    every: int
    at_end: bool = False
    at_first: bool = False
    after: int = 0

    def due(self, step: int, *, last: bool) -> bool:
        """Whether it is due after `step` steps (the first is 1)."""
        if step < self.after:
            return False
        regular = self.every > 0 and step % self.every == 0
        return regular or (last and self.at_end) or (step == 1 and self.at_first)


def cadence(strategy: str, every: float | None, budget: Budget, *, at_end: bool = False) -> Cadence:
    """The cadence of a strategy: steps (every so many; below 1 a share of the run) or epoch; others are never due."""
    if strategy in ("no", "best"):
        return Cadence(0)
    if strategy == "epoch":
        return Cadence(budget.steps_per_epoch, at_end=True)
    steps = every or 500
    return Cadence(max(1, math.ceil(steps * budget.max_steps) if steps < 1 else int(steps)), at_end=at_end)
