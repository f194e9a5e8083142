"""The table of keys: complete, and each key declared as it should be."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from fourfold.base import registry
from fourfold.config.key import Status
from fourfold.config.load import load
from fourfold.config.schema import SECTIONS, Run, table

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "keys.json").read_text(encoding="utf-8"))


def training_arguments() -> set[str]:
    """Fields of the installed transformers' argument classes, read without importing it."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    found: set[str] = set()
    for name in ("training_args.py", "training_args_seq2seq.py"):
        tree = ast.parse((Path(spec.origin).parent / name).read_text(encoding="utf-8"))
        classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and "TrainingArguments" in node.name)
        fields = (line.target for node in classes for line in node.body if isinstance(line, ast.AnnAssign))
        found |= {field.id for field in fields if isinstance(field, ast.Name)}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("tool", ["llamafactory", "transformers"])
def test_table_when_another_tool_has_a_key_knows_it(tool: str) -> None:
    assert set(GOLDEN[tool]) <= set(table())


def test_table_when_transformers_is_installed_knows_its_arguments() -> None:
    fields = training_arguments()
    assert len(fields) > 100
    assert fields <= set(table())


def test_table_when_a_key_is_not_obeyed_says_what_becomes_of_it() -> None:
    silent = [key.name for key in table().values() if key.spec.status is not Status.OBEYED and not key.spec.note]
    assert silent == []


def test_table_when_a_key_is_declared_has_help() -> None:
    assert [key.name for key in table().values() if not key.spec.help.endswith((".", ":"))] == []


def test_table_when_a_value_is_renamed_or_default_is_a_choice() -> None:
    for key in table().values():
        choices = key.choices()
        if choices and isinstance(key.default, str):
            assert key.default in choices, key.name
        assert not key.spec.renamed or set(key.spec.renamed.values()) <= set(choices), key.name
        assert not set(key.spec.refused) & set(choices), key.name


def test_load_when_every_key_has_its_default_gives_the_default_run() -> None:
    keys = {key.name: key.default for key in table().values()}
    keys.pop("disable_gradient_checkpointing")
    run = load(keys)
    assert run.notes == ()
    same = load({"do_train": False})
    assert [getattr(run, name) for name in SECTIONS] == [getattr(same, name) for name in SECTIONS]


def test_run_when_changed_refuses() -> None:
    run = Run()
    with pytest.raises(AttributeError):
        run.notes = ("x",)  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        run.data.cutoff_len = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["stage", "optim", "infer_backend", "template"])
def test_choices_when_a_folder_holds_the_entries_list_its_files(name: str) -> None:
    key = table()[name]
    assert key.spec.folder is not None
    assert set(registry.names(key.spec.folder.package, key.spec.folder.suffix)) <= set(key.choices())
    assert key.default in key.choices()
