"""Local paths of models and adapters: what can be told of them without reading a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fourfold.base.errors import ConfigError
from fourfold.base.modelscope import use_modelscope
from fourfold.config.rules import Verb
from fourfold.config.schema import Run

MODEL = "model_name_or_path"
ADAPTER = "adapter_name_or_path"
TEACHER = "teacher_model"
TEACHER_ADAPTER = "teacher_model_adapters"
REFERENCE = "ref_model"
REFERENCE_ADAPTER = "ref_model_adapters"
REWARD = "reward_model"
REWARD_ADAPTER = "reward_model_adapters"

_WITH_REFERENCE = ("dpo", "kto", "ppo", "grpo")
_WITH_REWARD = ("ppo", "grpo")

_MODEL_FILE, _ADAPTER_FILE = "config.json", "adapter_config.json"


def is_gguf(name: str) -> bool:
    """Whether a model path names a GGUF file."""
    return name.lower().endswith(".gguf")


@dataclass(frozen=True, slots=True)
class NamedModel:
    """What a key names that is read as a model or as adapters.

    Attributes:
        key: the key.
        names: hub ids, folders or files; one where the key takes no more.
        adapter_key: where an adapter belongs that is given as the model; "" if these are adapters themselves.
        folder: within an adapter's folder, where it lies.
        is_single: the key takes one name.
    """

    key: str
    names: tuple[str, ...]
    adapter_key: str = ""
    folder: str = ""
    is_single: bool = False


def named_models(run: Run, verb: Verb) -> Iterator[NamedModel]:
    """Every model and adapter that a verb reads of a run."""
    model, preference, stage = run.model, run.preference, run.training.stage
    yield from _named(MODEL, model.model_name_or_path, ADAPTER)
    yield NamedModel(ADAPTER, model.adapter_name_or_path, folder=model.adapter_folder or "")
    if verb in ("data", "chat", "export"):
        return
    yield from _named(TEACHER, preference.teacher_model, TEACHER_ADAPTER)
    yield NamedModel(TEACHER_ADAPTER, preference.teacher_model_adapters)
    if stage in _WITH_REFERENCE and preference.ref_model:
        yield from _named(REFERENCE, preference.ref_model, REFERENCE_ADAPTER)
        yield NamedModel(REFERENCE_ADAPTER, preference.ref_model_adapters)
    if stage in _WITH_REWARD and preference.reward_model:
        if preference.reward_model_type == "lora":
            yield NamedModel(REWARD, (preference.reward_model,), is_single=True)
        elif preference.reward_model_type == "full":
            yield from _named(REWARD, preference.reward_model, REWARD_ADAPTER)
            yield NamedModel(REWARD_ADAPTER, preference.reward_model_adapters)


def _named(key: str, name: str | None, adapter_key: str) -> Iterator[NamedModel]:
    if name:
        yield NamedModel(key, (name,), adapter_key, is_single=True)


def check_paths(run: Run, verb: Verb) -> None:
    """Refuse local models and adapters that are not there or are something else.

    Raises:
        ConfigError: with every problem.
    """
    problems: list[str] = []
    for named in named_models(run, verb):
        problems += _model_problems(named, verb) if named.adapter_key else _adapter_problems(named)
    if problems:
        raise ConfigError(problems)


def names_hub(run: Run) -> bool:
    """Whether one of the models or adapters is to come from Hugging Face's hub."""
    if use_modelscope():
        return False
    names = (name for named in named_models(run, "train") for name in named.names)
    return any(not Path(name).expanduser().exists() for name in names)


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


def _model_problems(named: NamedModel, verb: Verb) -> Iterator[str]:
    key, (name,) = named.key, named.names
    path = Path(name).expanduser()
    if problem := missing(name, key):
        yield problem
    elif path.is_file() and not is_gguf(name):
        yield f"{key}: {name} is a file, but not a .gguf file. Give the folder that holds the model's {_MODEL_FILE}."
    elif path.is_dir() and (path / _ADAPTER_FILE).exists() and not (path / _MODEL_FILE).exists():
        yield (
            f"{key}: {name} holds an adapter, not a model. Give it as {named.adapter_key}, and the model that it was "
            f"trained on as {key}."
        )
    elif path.is_dir() and verb != "data" and not (path / _MODEL_FILE).exists():
        yield f"{key}: {name} holds no {_MODEL_FILE}. Give the folder that does, or a .gguf file."


def _adapter_problems(named: NamedModel) -> Iterator[str]:
    for name in named.names:
        folder = Path(name).expanduser()
        if problem := missing(name, named.key):
            yield problem
        elif folder.exists() and not (folder / named.folder / _ADAPTER_FILE).exists():
            where = f" in {named.folder}" if named.folder else ""
            yield f"{named.key}: {name} holds no {_ADAPTER_FILE}{where}. Give the folder that an adapter was saved to."
