"""Local paths of models and adapters, checked without reading a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import ConfigError
from fourfold.config.load import load
from fourfold.config.paths import check_paths
from fourfold.config.rules import Verb


def problems_of(verb: Verb = "train", **keys: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check_paths(load(keys), verb)
    return caught.value.problems


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter" / "best").mkdir(parents=True)
    (tmp_path / "adapter" / "adapter_config.json").touch()
    return tmp_path / "adapter"


def test_check_paths_when_all_are_there_says_nothing(model: Path, adapter: Path) -> None:
    check_paths(load({"model_name_or_path": str(model), "adapter_name_or_path": str(adapter)}), "train")
    check_paths(load({"model_name_or_path": "owner/name", "adapter_name_or_path": "owner/adapter"}), "train")
    check_paths(load({}), "train")


@pytest.mark.parametrize(
    ("name", "kind", "advice"),
    [
        ("/no/such", "folder", "exists."),
        ("./no", "folder", "exists."),
        ("a/b/c", "folder", "exists."),
        ("/no/model.gguf", "file", "exists."),
        ("nowhere", "folder", "or a hub id in the form owner/name."),
    ],
)
def test_check_paths_when_nothing_is_there_says_where_it_looked(name: str, kind: str, advice: str) -> None:
    (problem,) = problems_of(model_name_or_path=name)
    assert problem.startswith(f"model_name_or_path: there is no {kind} {name}")
    assert problem.endswith(advice)


def test_check_paths_when_several_are_wrong_names_all(model: Path) -> None:
    problems = problems_of(model_name_or_path="/no/such", adapter_name_or_path=f"/none,{model}")
    assert [problem.partition(":")[0] for problem in problems] == [
        "model_name_or_path",
        "adapter_name_or_path",
        "adapter_name_or_path",
    ]
    assert problems[2] == (
        f"adapter_name_or_path: {model} holds no adapter_config.json. Give the folder that an adapter was saved to."
    )


def test_check_paths_when_the_model_is_a_plain_file_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (problem,) = problems_of(model_name_or_path=str(tmp_path / "model.safetensors"))
    assert problem.endswith("is a file, but not a .gguf file. Give the folder that holds the model's config.json.")


def test_check_paths_when_the_model_is_an_adapter_says_so(adapter: Path) -> None:
    (problem,) = problems_of(model_name_or_path=str(adapter))
    assert problem == (
        f"model_name_or_path: {adapter} holds an adapter, not a model. Give it as adapter_name_or_path, and the model "
        "that it was trained on as model_name_or_path."
    )


def test_check_paths_when_the_folder_has_no_config_names_it_unless_only_the_tokenizer_is_needed(tmp_path: Path) -> None:
    (problem,) = problems_of(model_name_or_path=str(tmp_path))
    assert problem == (
        f"model_name_or_path: {tmp_path} holds no config.json. Give the folder that does, or a .gguf file."
    )
    check_paths(load({"model_name_or_path": str(tmp_path)}), "data")


def test_check_paths_when_the_adapter_is_not_in_its_folder_says_so(model: Path, adapter: Path) -> None:
    (problem,) = problems_of(model_name_or_path=str(model), adapter_name_or_path=str(adapter), adapter_folder="best")
    assert problem.startswith(f"adapter_name_or_path: {adapter} holds no adapter_config.json in best.")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (
            {"ref_model": "/nope/ref", "ref_model_adapters": "/nope/a,/nope/b"},
            ["ref_model", *["ref_model_adapters"] * 2],
        ),
        ({"stage": "ppo", "reward_model": "/nope/r"}, ["reward_model"]),
        (
            {
                "stage": "grpo",
                "reward_model": "/nope/r",
                "reward_model_type": "full",
                "reward_model_adapters": "/nope/a",
            },
            ["reward_model", "reward_model_adapters"],
        ),
        ({"stage": "kd", "teacher_model": "/nope/t"}, ["teacher_model"]),
    ],
)
def test_check_paths_when_a_second_model_is_not_there_names_its_key(
    model: Path, keys: dict[str, str], named: list[str]
) -> None:
    problems = problems_of(**{"stage": "dpo", "model_name_or_path": str(model), **keys})
    assert [problem.partition(":")[0] for problem in problems] == named
    assert all("there is no folder /no" in problem for problem in problems)


def test_check_paths_when_second_models_are_of_another_kind_says_so(model: Path, adapter: Path) -> None:
    keys = {"model_name_or_path": str(model), "ref_model": str(adapter), "reward_model": str(model)}
    reference, reward = problems_of(stage="ppo", **keys)
    assert reference.startswith(f"ref_model: {adapter} holds an adapter, not a model. Give it as ref_model_adapters")
    assert reward.startswith(f"reward_model: {model} holds no adapter_config.json.")
    check_paths(load({**keys, "stage": "sft"}), "train")  # which reads neither
    check_paths(load({**keys, "stage": "ppo"}), "chat")
    address = {"reward_model": "http://localhost:1", "reward_model_type": "api", "model_name_or_path": str(model)}
    check_paths(load({**address, "stage": "ppo"}), "train")
