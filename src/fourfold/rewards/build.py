"""The rewards that a run's config asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fourfold.base.errors import ConfigError
from fourfold.config.schema import Run
from fourfold.rewards import model
from fourfold.rewards.endpoint import EndpointReward
from fourfold.rewards.functions import FunctionReward
from fourfold.rewards.imported import Imported, import_function
from fourfold.rewards.interface import Reward
from fourfold.rewards.model import ModelReward, Scorer
from fourfold.rewards.table import RewardTable

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, special tokens included."""


def build_rewards(run: Run, scorer: Scorer | None, decode: Decode | None = None) -> RewardTable:
    """All rewards of `reward_funcs` in their order, then that of `reward_model`, with `reward_weights`.

    Args:
        scorer: scores whole sequences by the reward model; called only when rollouts are scored, and needed only where
            `reward_model` names a model.
        decode: makes the text that an endpoint is sent of all token ids of a rollout, as LLaMA-Factory does; without it
            the endpoint is sent the texts of prompt and completion.
    Raises:
        ConfigError: with every entry of reward_funcs that is not usable.
    """
    rewards: list[Reward] = [*_function_rewards(run.reinforcement.reward_funcs)]
    asked = run.preference
    if asked.reward_model and asked.reward_model_type == "api":
        text_of = None if decode is None else lambda rollout: decode([*rollout.prompt_ids, *rollout.completion_ids])
        rewards.append(EndpointReward(asked.reward_model, text_of))
    elif asked.reward_model:
        assert scorer is not None, "a reward model needs a scorer"
        rewards.append(ModelReward(scorer))
    return RewardTable(rewards, run.reinforcement.reward_weights or [1.0] * len(rewards))


def check_reward_functions(run: Run) -> None:
    """Import every function of `reward_funcs`, so that what is wrong is said before a model is loaded.

    Raises:
        ConfigError: with every entry that is not usable.
    """
    _function_rewards(run.reinforcement.reward_funcs)


def _function_rewards(entries: Sequence[str]) -> list[FunctionReward]:
    found: list[Imported] = []
    problems: list[str] = []
    for entry in entries:
        try:
            found.append(import_function(entry))
        except ConfigError as error:
            problems += error.problems
    same: dict[int, list[str]] = {}
    for one in found:
        same.setdefault(id(one.function), []).append(one.entry)
    problems += [
        f"reward_funcs: {' and '.join(entries)} are the same function. Name it once, and weigh it by reward_weights."
        for entries in same.values()
        if len(entries) > 1
    ]
    if problems:
        raise ConfigError(problems)
    shared = Counter([model.NAME, *(one.name for one in found)])
    return [FunctionReward(one, one.name if shared[one.name] == 1 else _long_name(one.entry)) for one in found]


def _long_name(entry: str) -> str:
    """A name for one of several functions with the same: the whole entry, fit for the name of a metric."""
    return entry.replace("/", ".").replace(":", ".").strip(".")
