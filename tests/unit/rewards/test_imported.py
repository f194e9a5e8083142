"""Finding the functions of reward_funcs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fourfold.base.errors import ConfigError
from fourfold.rewards.imported import INPUTS, import_function

SOURCE = """
from dataclasses import dataclass
from helper_of_rewards import ONE

@dataclass
class Judge:
    def __call__(self, completions, **kwargs):
        return [ONE for _ in completions]

judge = Judge()
number = 3

def length(completions, *, references=None):
    return [float(len(one)) for one in completions]

def single(completion):
    return 1.0

def wants_more(completions, ground_truth):
    return []

def by_position(completions, /):
    return []

async def later(completions):
    return []
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "helper_of_rewards.py").write_text("ONE = 1.0")
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "lacking_rewards.py").write_text("import not_a_module_anywhere\n")
    return tmp_path


def problem_of(entry: str) -> str:
    with pytest.raises(ConfigError) as caught:
        import_function(entry)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


@pytest.mark.parametrize("entry", ["own_rewards:length", "own_rewards.length", "own_rewards.py:length"])
def test_import_function_when_it_exists_finds_it_by_every_form(folder: Path, entry: str) -> None:
    found = import_function(entry)
    assert (found.entry, found.name, found.inputs) == (entry, "length", ("completions", "references"))
    assert found.function(completions=["abc"]) == [3.0]


def test_import_function_when_a_file_is_elsewhere_finds_it_with_its_neighbours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    found = import_function(f"{folder}/own_rewards.py:judge")
    assert found.inputs == INPUTS
    assert found.function(completions=["abc"]) == [1.0]


def test_import_function_when_two_entries_are_of_one_file_runs_it_once(folder: Path) -> None:
    first = import_function("own_rewards.py:length").function
    assert import_function("./own_rewards.py:length").function is first


def test_import_function_when_it_is_a_plain_name_takes_the_builtin() -> None:
    assert import_function("exact_match").inputs == ("completions", "references")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("exact_mach", "there is no reward 'exact_mach'. Did you mean exact_match?"),
        ("_same", "there is no reward '_same'"),
        ("own_reward:length", "there is no module own_reward (entry own_reward:length)"),
        ("own_rewards.sub:length", "own_rewards.sub"),
        ("own_rewards:lenght", "own_rewards has no 'lenght' (entry own_rewards:lenght). Did you mean length?"),
        ("own_rewards:number", "own_rewards:number is a int, not a plain function"),
        ("own_rewards:Judge", "own_rewards:Judge is a type, not a plain function"),
        ("own_rewards:later", "own_rewards:later is async, not a plain function"),
        ("own_rewards:single", "asks for 'completion', which there is not. Did you mean completions?"),
        ("own_rewards:wants_more", "asks for 'ground_truth', which there is not. A reward function may take the lists"),
        ("own_rewards:by_position", "takes 'completions' by position"),
        ("own_reward.py:length", "Did you mean own_rewards.py?"),
        ("nowhere/own.py:f", "there is no file /"),
        ("broken_rewards:f", "broken_rewards cannot be imported (entry broken_rewards:f), line 2: SyntaxError"),
        (
            "broken_rewards.py:f",
            "broken_rewards.py cannot be imported (entry broken_rewards.py:f), line 2: SyntaxError",
        ),
        ("lacking_rewards:f", "lacking_rewards cannot be imported (entry lacking_rewards:f): ModuleNotFoundError"),
        (":f", ":f does not name a function"),
        ("own_rewards:", "own_rewards has no ''"),
        (".f", ".f does not name a function"),
        ("own_rewards.py", "own_rewards has no 'py'"),
        ("folder/own_rewards.py", "folder/own_rewards.py does not name a function"),
    ],
)
def test_import_function_when_it_cannot_be_used_names_what_is_wrong(folder: Path, entry: str, expected: str) -> None:
    problem = problem_of(entry)
    assert problem.startswith("reward_funcs: ")
    assert expected in problem
