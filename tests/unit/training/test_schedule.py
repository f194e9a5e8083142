"""Steps, warm-up and learning rates are counted as Transformers' Trainer counts them."""

from __future__ import annotations

import pytest
import torch

from fourfold.base.errors import ConfigError
from fourfold.config.load import load
from fourfold.training.schedule import FOLLOW_METRIC, Cadence, cadence, make_scheduler, plan_steps, restore_schedule


def _rates(**keys: object) -> tuple[int, list[float]]:
    """Number of steps and the rate that each is taken with."""
    training = load(keys).training
    budget = plan_steps(training, 591)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    scheduler = make_scheduler(training, optimizer, budget)
    rates = []
    for _ in range(budget.max_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return budget.max_steps, rates


def test_rates_when_cosine_with_warmup_equal_the_reference() -> None:
    # Origin: LLaMA-Factory 0.9.6.dev0 (commit ff6d4d1), 591 samples, 3 epochs of batch 2 x accumulation 4.
    steps, rates = _rates(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        learning_rate=5e-5,
        num_train_epochs=3.0,
    )
    assert steps == 222
    assert rates[0] == 0.0
    expected = {
        5: 8.695652173913044e-06,
        10: 1.956521739130435e-05,
        15: 3.0434782608695656e-05,
        20: 4.130434782608696e-05,
        25: 4.999688473794144e-05,
        220: 2.8032700388910814e-08,
    }
    assert {step: rates[step - 1] for step in expected} == expected


@pytest.mark.parametrize(
    ("keys", "max_steps", "warmup"),
    [
        ({"max_steps": 10, "warmup_steps": 3}, 10, 3),
        ({"num_train_epochs": 0.5}, 37, 0),
        ({"global_batch_size": 100, "num_train_epochs": 1, "warmup_ratio": 0.01}, 6, 1),
    ],
)
def test_plan_steps_when_given_otherwise_counts_right(keys: dict[str, object], max_steps: int, warmup: int) -> None:
    budget = plan_steps(load(keys).training, 591)
    assert (budget.max_steps, budget.warmup_steps) == (max_steps, warmup)


def test_cadence_when_due_is_regular_and_at_the_end() -> None:
    every_third = Cadence(3, at_end=True)
    assert [step for step in range(1, 9) if every_third.due(step, last=step == 8)] == [3, 6, 8]
    assert [step for step in range(1, 9) if Cadence(3, after=5, at_first=True).due(step, last=False)] == [6]


def test_cadence_when_share_of_the_run_counts_steps() -> None:
    budget = plan_steps(load({"max_steps": 40}).training, 591)
    assert cadence("steps", 0.25, budget).every == 10
    assert cadence("epoch", 7, budget).every == budget.steps_per_epoch
    assert not cadence("no", 7, budget).due(7, last=True)


def test_make_scheduler_when_it_does_not_take_a_setting_says_which() -> None:
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs: \{'pow': 2\} does not go with .*: polynomial"):
        _rates(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"pow": 2})


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1},
    ],
)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_schedule_when_put_back_with_other_groups_goes_on(keys: dict[str, object], before: int, after: int) -> None:
    training = load({**keys, "learning_rate": 1e-3, "max_steps": 10, "val_size": 0.1, "dataset": "x"}).training
    budget = plan_steps(training, 591)
    follows = training.lr_scheduler_type in FOLLOW_METRIC

    def make(count: int) -> torch.optim.lr_scheduler.LRScheduler:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(count)]
        return make_scheduler(training, torch.optim.SGD(groups, lr=training.learning_rate), budget)

    def take(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            scheduler.optimizer.step()
            scheduler.step(1.0) if follows else scheduler.step()  # type: ignore[arg-type]
            rates += [group["lr"] for group in scheduler.optimizer.param_groups[:1]]
        return rates

    first, second = make(before), make(after)
    take(first, 4)
    second.optimizer.param_groups[0]["lr"] = first.optimizer.param_groups[0]["lr"]  # as load_optimizer does
    restore_schedule(second, first.state_dict())
    assert second.get_last_lr() == [group["lr"] for group in second.optimizer.param_groups]
    assert take(second, 6) == take(first, 6)
