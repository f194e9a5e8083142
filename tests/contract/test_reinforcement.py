"""Stages grpo and ppo by the real command: rewards, what is learnt, what is logged, resuming, bad rewards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import ConfigError, ModelError
from tiny_models import save_tiny_model
from training_runs import losses, run, write_dataset

_GRPO: dict[str, Any] = {
    "stage": "grpo",
    "finetuning_type": "full",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "num_generations": 4,
    "max_new_tokens": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_steps": 3,
    "save_strategy": "no",
}
_REWARDS = """
import random

def short(completions, **kwargs):
    return [-float(len(c)) for c in completions]

def odd_fails(completions, **kwargs):
    if len(completions) > 1 or len(completions[0]) % 2:
        raise ValueError("odd")
    return [1.0]

def always_fails(completions, **kwargs):
    raise ValueError("never")

def too_few(completions, **kwargs):
    return [1.0]

def same(completions, **kwargs):
    return [1.0] * len(completions)

def not_a_number(completions, **kwargs):
    return [float("nan")] * len(completions)

def brief(completions, finished, **kwargs):
    return [1.0 if f and len(c.split()) <= 5 else 0.0 for c, f in zip(completions, finished)]

_random = random.Random(0)

def shuffled(completions, finished, **kwargs):
    found = brief(completions, finished)
    _random.shuffle(found)
    return found
"""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(_REWARDS, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"grpo_variant": "dapo", "overlong_buffer": 4, "num_iterations": 2},
        {"grpo_variant": "dr_grpo", "mask_truncated_completions": True},
        {"grpo_variant": "gspo", "kl_weight": 0.1, "num_iterations": 2},
        {"finetuning_type": "lora", "kl_weight": 0.1},
    ],
)
def test_grpo_when_it_runs_logs_what_it_did(
    keys: dict[str, Any], tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, **{**_GRPO, "reward_funcs": f"{rewards}:short", **keys})
    if not {"grpo_variant", "num_iterations"} & keys.keys():
        assert losses(tmp_path)[0] == pytest.approx(0, abs=1e-4)  # advantages of a group add up to nothing
    for figure in ("reward", "reward_std", "rewards/short", "response_length", "truncated", "clip_fraction", "entropy"):
        assert all(map(math.isfinite, losses(tmp_path, figure))), figure
    assert len(losses(tmp_path, "reward")) == 3
    if "kl_weight" in keys:
        if "num_iterations" not in keys:
            assert losses(tmp_path, "kl")[0] == pytest.approx(0, abs=1e-6)
        assert losses(tmp_path, "kl")[-1] > 0
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 * 4
    assert rows[0]["reward"] == rows[0]["rewards/short"] == -len(rows[0]["completion"])


def test_grpo_when_resumed_goes_on_as_if_it_had_not_stopped(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    keys = {**_GRPO, "reward_funcs": f"{rewards}:short", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(tiny_llama, tiny_data, tmp_path / "whole", **keys)
    run(tiny_llama, tiny_data, tmp_path / "cut", **keys)
    again = str(tmp_path / "cut" / "checkpoint-2")
    run(tiny_llama, tiny_data, tmp_path / "cut", **keys, resume_from_checkpoint=again)
    for figure in ("loss", "reward", "grad_norm"):
        assert losses(tmp_path / "cut", figure)[-2:] == losses(tmp_path / "whole", figure)[-2:]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("always_fails", r"reward_funcs: .*always_fails.*ValueError.*every completion"),
        ("too_few", r"reward_funcs: .*too_few.*1 .*16"),
        ("not_there", r"reward_funcs: .*not_there"),
    ],
)
def test_grpo_when_a_reward_is_no_good_is_refused_in_a_line(
    function: str, message: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_llama, tiny_data, tmp_path, **{**_GRPO, "reward_funcs": f"{rewards}:{function}"})


@pytest.mark.parametrize("function", ["odd_fails", "same", "not_a_number"])
def test_grpo_when_some_rewards_are_missing_or_all_are_equal_goes_on(
    function: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, **{**_GRPO, "reward_funcs": f"{rewards}:{function}", "max_steps": 2})
    assert all(map(math.isfinite, losses(tmp_path)))
    if function == "same":
        assert losses(tmp_path, "groups_without_spread") == [1.0, 1.0]
        assert losses(tmp_path, "grad_norm") == [0.0, 0.0]


def test_grpo_when_groups_have_one_answer_is_refused(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    with pytest.raises(ConfigError, match="num_generations: 1"):
        run(tiny_llama, tiny_data, tmp_path, **{**_GRPO, "reward_funcs": f"{rewards}:short", "num_generations": 1})


def test_grpo_when_no_reward_is_given_is_refused(tiny_llama: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward_funcs"):
        run(tiny_llama, tiny_data, tmp_path, **_GRPO)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model that has learnt to answer with three to thirteen words, and its data."""
    folder = tmp_path_factory.mktemp("talker")
    write_dataset(folder / "data", 40)
    model = save_tiny_model(folder / "model")
    keys: dict[str, Any] = {"finetuning_type": "full", "learning_rate": 3e-3, "num_train_epochs": 40}
    run(model, folder / "data", folder / "sft", **keys, per_device_train_batch_size=8, save_strategy="no")
    return folder / "sft", folder / "data"


_LEARN = {**_GRPO, "learning_rate": 2e-4, "num_generations": 8, "max_new_tokens": 20, "max_steps": 40}


def _rise(folder: Path) -> float:
    """Mean reward of the last five steps less that of the first."""
    found = losses(folder, "reward")
    return sum(found[-5:]) / 5 - found[0]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_grpo_when_short_answers_are_rewarded_learns_to_be_brief(
    seed: int, talker: tuple[Path, Path], tmp_path: Path, rewards: Path
) -> None:
    model, data = talker
    run(model, data, tmp_path, **{**_LEARN, "reward_funcs": f"{rewards}:brief", "seed": seed})
    assert losses(tmp_path, "reward")[0] < 0.5
    assert _rise(tmp_path) > 0.5


def test_grpo_when_rewards_are_shuffled_learns_nothing(
    talker: tuple[Path, Path], tmp_path: Path, rewards: Path
) -> None:
    model, data = talker
    rises = []
    for seed in (1, 2, 3):
        run(model, data, tmp_path / str(seed), **{**_LEARN, "reward_funcs": f"{rewards}:shuffled", "seed": seed})
        rises.append(_rise(tmp_path / str(seed)))
    assert max(rises) < 0.3
    assert sum(rises) / 3 < 0.2


_PPO: dict[str, Any] = {
    "stage": "ppo",
    "finetuning_type": "full",
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "max_new_tokens": 20,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_steps": 3,
    "save_strategy": "no",
    "per_device_train_batch_size": 8,
}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"finetuning_type": "lora", "ppo_buffer_size": 2, "ppo_epochs": 2},
        {"ppo_score_norm": True, "ppo_whiten_rewards": True},
    ],
)
def test_ppo_when_it_runs_logs_what_it_did(
    keys: dict[str, Any], tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, **{**_PPO, "reward_funcs": f"{rewards}:short", "max_new_tokens": 8, **keys})
    for figure in ("reward", "kl", "kl_weight", "policy", "value", "values", "clip_fraction", "entropy", "approx_kl"):
        assert len(losses(tmp_path, figure)) == 3
        assert all(map(math.isfinite, losses(tmp_path, figure))), figure
    assert losses(tmp_path, "kl")[0] == pytest.approx(0, abs=1e-5)
    assert losses(tmp_path, "kl_weight")[:2] == [
        0.2,
        pytest.approx(0.2 * (1 - 0.2 * 8 * keys.get("ppo_buffer_size", 1) / 10000)),
    ]


@pytest.mark.parametrize(("stage", "tuning"), [("grpo", "full"), ("grpo", "lora"), ("ppo", "full"), ("ppo", "lora")])
def test_run_when_layouts_differ_makes_the_same_rollouts_and_losses(
    stage: str, tuning: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    """Also of the reference, which counts in both stages."""
    own: dict[str, Any] = {"kl_weight": 0.05, "global_batch_size": 4} if stage == "grpo" else {"global_batch_size": 8}
    keys = {**(_GRPO if stage == "grpo" else _PPO), "max_new_tokens": 8, "max_steps": 3, "finetuning_type": tuning}
    keys |= {"reward_funcs": f"{rewards}:short", "learning_rate": 1e-2 if tuning == "lora" else 1e-3, **own}
    run(tiny_llama, tiny_data, tmp_path / "one", **keys)
    for strategy in ("fsdp", "tp", "pp"):
        run(tiny_llama, tiny_data, tmp_path / strategy, **keys, nproc=2, strategy=strategy)
        assert losses(tmp_path / strategy, "reward") == losses(tmp_path / "one", "reward")
        for figure in ("loss", "kl"):
            assert losses(tmp_path / strategy, figure) == pytest.approx(losses(tmp_path / "one", figure), abs=1e-5)


def test_ppo_when_resumed_goes_on_as_if_it_had_not_stopped(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path, rewards: Path
) -> None:
    keys = {**_PPO, "reward_funcs": f"{rewards}:short", "max_new_tokens": 8, "max_steps": 4}
    keys |= {"save_strategy": "steps", "save_steps": 2, "ppo_score_norm": True}
    run(tiny_llama, tiny_data, tmp_path / "whole", **keys)
    run(tiny_llama, tiny_data, tmp_path / "cut", **keys)
    again = str(tmp_path / "cut" / "checkpoint-2")
    run(tiny_llama, tiny_data, tmp_path / "cut", **keys, resume_from_checkpoint=again)
    for figure in ("loss", "reward", "kl_weight", "value"):
        assert losses(tmp_path / "cut", figure)[-2:] == losses(tmp_path / "whole", figure)[-2:]


_PPO_LEARN = {**_PPO, "max_steps": 30, "per_device_train_batch_size": 40}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ppo_when_short_answers_are_rewarded_learns_to_be_brief(
    seed: int, talker: tuple[Path, Path], tmp_path: Path, rewards: Path
) -> None:
    model, data = talker
    run(model, data, tmp_path, **{**_PPO_LEARN, "reward_funcs": f"{rewards}:brief", "seed": seed})
    assert losses(tmp_path, "reward")[0] < 0.5
    assert _rise(tmp_path) > 0.4


def test_ppo_when_rewards_are_shuffled_learns_nothing(talker: tuple[Path, Path], tmp_path: Path, rewards: Path) -> None:
    model, data = talker
    rises = []
    for seed in (1, 2, 3):
        keys = {**_PPO_LEARN, "reward_funcs": f"{rewards}:shuffled", "seed": seed}
        run(model, data, tmp_path / str(seed), **keys)
        rises.append(_rise(tmp_path / str(seed)))
    assert max(rises) < 0.35
    assert sum(rises) / 3 < 0.2


def test_ppo_when_a_reward_model_judges_asks_it(tiny_llama: Path, tiny_data: Path, tmp_path: Path) -> None:
    judge: dict[str, Any] = {"stage": "rm", "dataset": "tiny_pairs", "max_steps": 2, "save_strategy": "no"}
    run(tiny_llama, tiny_data, tmp_path / "judge", **judge)
    keys = {**_PPO, "max_new_tokens": 8, "finetuning_type": "lora", "reward_model": str(tmp_path / "judge")}
    run(tiny_llama, tiny_data, tmp_path / "out", **keys)
    assert losses(tmp_path / "out", "rewards/reward_model") == losses(tmp_path / "out", "reward")
    assert losses(tmp_path / "out", "reward_std")[0] > 0
    with pytest.raises(ModelError, match="value_head"):
        run(
            tiny_llama,
            tiny_data,
            tmp_path / "none",
            **{**keys, "reward_model": str(tiny_llama), "reward_model_type": "full"},
        )
