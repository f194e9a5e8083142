"""The rewards of a run's config."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import ConfigError
from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.rewards.build import build_rewards, check_reward_functions
from fourfold.rewards.endpoint import EndpointReward
from reward_rollouts import rollout


def run_of(**keys: Any) -> Run:
    return load({"do_train": False, "stage": "grpo", **keys})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "first.py").write_text("def f(completions):\n    return [1.0] * len(completions)\ng = f\n")
    (tmp_path / "second.py").write_text("def f(completions):\n    return [2.0] * len(completions)\n")
    return tmp_path


def test_build_rewards_when_functions_and_model_are_given_weighs_them_in_order() -> None:
    seen: list[Any] = []

    def scorer(sequences: Any) -> list[float]:
        seen.extend(sequences)
        return [0.25]

    run = run_of(reward_funcs="one_sentence,exact_match", reward_model="m", reward_weights="1,10,100")
    scores = build_rewards(run, scorer).score([rollout("42", "42", prompt="A")])
    assert scores.by_name == {"one_sentence": [0.0], "exact_match": [1.0], "reward_model": [0.25]}
    assert scores.total == [35.0]
    assert seen == [[65, 52, 50]]


def test_build_rewards_when_no_weights_are_given_weighs_all_alike() -> None:
    run = run_of(reward_funcs=["one_sentence", "exact_match"])
    assert build_rewards(run, None).score([rollout("Yes.", "Yes.")]).total == [2.0]


def test_build_rewards_when_the_model_is_not_finite_gives_no_reward() -> None:
    (total,) = build_rewards(run_of(reward_model="m"), lambda _: [math.inf]).score([rollout("a")]).total
    assert math.isnan(total)


def test_build_rewards_when_functions_share_a_name_tells_them_apart(folder: Path) -> None:
    table = build_rewards(run_of(reward_funcs="first:f,second.py:f,exact_match"), None)
    assert table.names == ("first.f", "second.py.f", "exact_match")


def test_build_rewards_when_entries_are_wrong_reports_all(folder: Path) -> None:
    run = run_of(reward_funcs="first:g,first.f,first:h,third:f")
    for build in (lambda: build_rewards(run, None), lambda: check_reward_functions(run)):
        with pytest.raises(ConfigError) as caught:
            build()
        lacking, missing, same = caught.value.problems
        assert "first has no 'h'" in lacking
        assert "no module third" in missing
        assert same == (
            "reward_funcs: first:g and first.f are the same function. Name it once, and weigh it by reward_weights."
        )


def test_build_rewards_when_an_endpoint_is_asked_sends_decoded_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def ask(self: EndpointReward, texts: list[str]) -> list[float]:
        sent.extend(texts)
        return [3.0]

    monkeypatch.setattr(EndpointReward, "_ask", ask)
    run = run_of(reward_model="http://localhost:1/score", reward_model_type="api")
    for decode in (None, lambda ids: " ".join(map(str, ids))):
        assert build_rewards(run, None, decode).score([rollout("b", prompt="a")]).by_name == {"reward_model": [3.0]}
    assert sent == ["ab", "97 98"]
