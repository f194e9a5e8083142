"""Local paths of models and adapters: what can be told of them without reading a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fourfold.base.errors import ConfigError
from fourfold.config.rules import Verb
from fourfold.config.schema import Run

MODEL = "model_name_or_path"
ADAPTER = "adapter_name_or_path"
TEACHER = "teacher_model"
TEACHER_ADAPTER = "teacher_model_adapters"

_MODEL_FILE, _ADAPTER_FILE = "config.json", "adapter_config.json"


def is_gguf(name: str) -> bool:
    """Whether a model path names a GGUF file."""
    return name.lower().endswith(".gguf")


def check_paths(run: Run, verb: Verb) -> None:
    """Refuse local models and adapters that are not there or are something else.

    Raises:
        ConfigError: with every problem.
    """
    model, preference = run.model, run.preference
    problems = [
        *_model_problems(model.model_name_or_path, MODEL, ADAPTER, verb),
        *_adapter_problems(model.adapter_name_or_path, ADAPTER, model.adapter_folder or ""),
    ]
    if verb not in ("data", "chat", "export"):
        problems += _model_problems(preference.teacher_model, TEACHER, TEACHER_ADAPTER, verb)
        problems += _adapter_problems(preference.teacher_model_adapters, TEACHER_ADAPTER, "")
    if problems:
        raise ConfigError(problems)


def names_hub(run: Run) -> bool:
    """Whether the model, the teacher or an adapter is to come from a hub."""
    preference = run.preference
    named = (
        *(run.model.model_name_or_path, *run.model.adapter_name_or_path),
        *(preference.teacher_model, *preference.teacher_model_adapters),
    )
    return any(name and not Path(name).expanduser().exists() for name in named)


def missing(name: str, key: str) -> str | None:
    """The message for a name that looks like a local path, or like no hub id, where there is nothing; else None."""
    path = Path(name).expanduser()
    if path.exists():
        return None
    looks_local = is_gguf(name) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not looks_local and os.sep in name:
        return None
    where = f" (in {Path.cwd()})" if not path.is_absolute() else ""
    kind = "file" if is_gguf(name) else "folder"
    hint = "" if looks_local else ", or a hub id in the form owner/name"
    return f"{key}: there is no {kind} {name}{where}. Give a path that exists{hint}."


def _model_problems(name: str | None, key: str, adapter_key: str, verb: Verb) -> Iterator[str]:
    if not name:
        return
    path = Path(name).expanduser()
    if problem := missing(name, key):
        yield problem
    elif path.is_file() and not is_gguf(name):
        yield f"{key}: {name} is a file, but not a .gguf file. Give the folder that holds the model's {_MODEL_FILE}."
    elif path.is_dir() and (path / _ADAPTER_FILE).exists() and not (path / _MODEL_FILE).exists():
        yield (
            f"{key}: {name} holds an adapter, not a model. Give it as {adapter_key}, and the model that it was trained "
            f"on as {key}."
        )
    elif path.is_dir() and verb != "data" and not (path / _MODEL_FILE).exists():
        yield f"{key}: {name} holds no {_MODEL_FILE}. Give the folder that does, or a .gguf file."


def _adapter_problems(names: Sequence[str], key: str, within: str) -> Iterator[str]:
    for name in names:
        folder = Path(name).expanduser()
        if problem := missing(name, key):
            yield problem
        elif folder.exists() and not (folder / within / _ADAPTER_FILE).exists():
            where = f" in {within}" if within else ""
            yield f"{key}: {name} holds no {_ADAPTER_FILE}{where}. Give the folder that an adapter was saved to."
