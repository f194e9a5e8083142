"""Models that see, trained on text: their language model is loaded by itself, and saved as a part of the whole again.

An adapter gets the names and the targets that Transformers' class of the whole has, so PEFT and inference engines load
it beside the published checkpoint. A whole model is written with all that was not loaded, as its files have it.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fourfold.base.errors import ModelError, first_line
from fourfold.base.log import get_logger
from fourfold.base.peft import PeftConfig
from fourfold.config.model import ModelConfig
from fourfold.families.composite import (
    decoder_in_whole,
    is_composite,
    name_alone,
    name_in_whole,
    put_back,
)
from fourfold.models.source import INDEX, fetch_file, gguf_path, hub_options, model_name, weight_files

log = get_logger(__name__)

_MARK = "_fourfold_whole"
_BASE = "base_model.model."
"""What PEFT puts before the names of a model's tensors."""
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_REST = "model-other-parts.safetensors"
_SOURCE = "whole_model.json"
"""In a folder that holds the language model alone: where the whole is."""
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a checkpoint that say how pictures become its inputs."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Whole:
    """The model that a language model is a part of.

    Attributes:
        config: of the whole.
        source: where its weights are.
    """

    config: PreTrainedConfig
    source: ModelConfig


def whole_config(name: str, **options: Any) -> PreTrainedConfig | None:
    """The config of the model of which a checkpoint's language model is a part; None where that is all.

    Args:
        options: those of `hub_options`, and others, which do not count.
    """
    if gguf_path(name) is not None:
        return None
    known = {key: options[key] for key in ("revision", "cache_dir", "token", "trust_remote_code") if key in options}
    config = AutoConfig.from_pretrained(name, **known)
    return config if is_composite(config) else None


def remember_whole(model: PreTrainedModel, config: ModelConfig) -> None:
    """Note, at a language model that was loaded by itself, what it is a part of; nothing where it is all."""
    name = model_name(config)
    source = _noted_source(name, config)
    if source is not None:
        whole = _find_noted(name, source)
    else:
        source, whole = config, whole_config(name, **hub_options(config))
        if whole is not None:
            log.info(
                "Of %s, a %s model, the language model is used; all else of it stays as it is.", name, whole.model_type
            )
    if whole is not None:
        setattr(model, _MARK, Whole(whole, source))


def note_source(folder: Path, whole: Whole) -> None:
    """Say in a folder that holds the language model alone where the whole is, for who loads it from there."""
    name = whole.source.model_name_or_path or ""
    local = Path(name).expanduser()
    place = {"model_name_or_path": str(local.resolve()) if local.exists() else name}
    described = place | {"model_revision": whole.source.model_revision}
    (folder / _SOURCE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _noted_source(name: str, config: ModelConfig) -> ModelConfig | None:
    """Where the whole is by `note_source`; None for a folder without it, and all other models."""
    path = Path(name).expanduser() / _SOURCE
    if not path.is_file():
        return None
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        update = {key: noted[key] for key in ("model_name_or_path", "model_revision")}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is damaged ({first_line(error)}). Remove it to use the language model alone."
        ) from error
    return config.model_copy(update=update)


def _find_noted(name: str, source: ModelConfig) -> PreTrainedConfig | None:
    """The config of the whole; None, after a line in the log, where it cannot be read any more."""
    try:
        return whole_config(model_name(source), **hub_options(source))
    except (OSError, ModelError) as error:
        log.warning(
            "The language model in %s is used by itself: %s, of which it is a part, cannot be read (%s).",
            name,
            source.model_name_or_path,
            first_line(error),
        )
        return None


def whole_of(model: nn.Module) -> Whole | None:
    """What a model is a part of; None where it is all."""
    return getattr(model, _MARK, None)


def renamed_alone(values: Mapping[str, Value]) -> dict[str, Value]:
    """An adapter's tensors by PEFT's names for the language model by itself, less what belongs to other parts."""
    found: dict[str, Value] = {}
    for name, value in values.items():
        alone = name_alone(name.removeprefix(_BASE))
        if alone is not None:
            found[_BASE + alone] = value
    return found


def settle_adapter(name: str, folder: str | None, config: ModelConfig) -> PeftConfig | None:
    """The config of an adapter that was made for the whole, for the language model by itself; None if its own will do.

    Its targets are what it has weights for.
    """
    within = "" if folder is None else f"{folder}/"
    described, file = (fetch_file(name, within + file, config) for file in (_ADAPTER_CONFIG, _ADAPTER))
    if described is None or file is None:
        return None
    with safe_open(file, framework="pt") as opened:
        names = [key.removeprefix(_BASE) for key in opened.keys()]  # noqa: SIM118 - it is no mapping
    left_out = [key for key in names if name_alone(key) is None]
    if left_out:
        log.warning(
            "adapter_name_or_path: %d tensors of %s are of other parts than the language model, and not used, e.g. %s.",
            len(left_out),
            name,
            left_out[0],
        )
    adapter: Any = PeftConfig.from_pretrained(str(described.parent))
    targets = getattr(adapter, "target_modules", None)
    if targets is None or not (isinstance(targets, str) or any("." in target for target in targets)):
        return adapter
    modules = {key.partition(".lora_")[0] for key in names if ".lora_" in key and name_alone(key) is not None}
    stacks = {name.rpartition(".")[0].rpartition(".")[2] for name in adapter.target_parameters or ()}
    kinds = {module.removesuffix(".base_layer").rpartition(".")[2] for module in modules}
    adapter.target_modules = kinds - stacks  # of stacked experts it is the parameters that are named
    return adapter


def complete_adapter(folder: Path, whole: Whole) -> None:
    """Give an adapter that was written for the language model the names and targets of the whole."""
    path, kind = folder / _ADAPTER, whole.config.model_type
    tensors = {
        _BASE + name_in_whole(name.removeprefix(_BASE), kind): tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    described = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    targets = described.get("target_modules")
    if isinstance(targets, list) and targets:
        kinds = "|".join(re.escape(target) for target in sorted(targets))
        described["target_modules"] = rf"{re.escape(decoder_in_whole(kind))}\.(?:.*\.)?(?:{kinds})"
    (folder / _ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def complete_model(folder: Path, whole: Whole) -> None:
    """Make a written language model a part of the whole again: names, weights and configs of the other parts.

    Without the weights of the whole (a model that is made anew) the language model is left by itself.
    """
    try:
        published = weight_files(whole.source) if not whole.source.train_from_scratch else None
    except (OSError, ModelError):
        published = None
    if published is None:
        log.info("The language model is saved by itself, since there are no weights of the other parts.")
        return
    names: dict[str, str] = {}
    others: dict[str, Tensor] = {}
    for file in published:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                alone = name_alone(name)
                if alone is None:
                    others[name] = opened.get_tensor(name)
                else:
                    names[alone] = name
    kind = whole.config.model_type
    places = dict.fromkeys(others, _REST)
    size = sum(tensor.nbytes for tensor in others.values())
    save_file(others, folder / _REST, {"format": "pt"})
    for number, path in enumerate(sorted(folder.glob("model*.safetensors"))):
        if path.name == _REST:
            continue
        tensors = {names.get(name, name_in_whole(name, kind)): tensor for name, tensor in load_file(path).items()}
        path.unlink()
        place = f"model-language-{number:05}.safetensors"
        save_file(tensors, folder / place, {"format": "pt"})
        places |= dict.fromkeys(tensors, place)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _complete_config(folder, whole)
    for name in _PROCESSORS:
        file = fetch_file(model_name(whole.source), name, whole.source)
        if file is not None:
            shutil.copyfile(file, folder / name)


def _complete_config(folder: Path, whole: Whole) -> None:
    config = copy.deepcopy(whole.config)
    put_back(config, AutoConfig.from_pretrained(folder))
    config.save_pretrained(str(folder))
