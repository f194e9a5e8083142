"""Where a model comes from: a hub id, a local folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from fourfold.base.errors import ConfigError, ModelError, first_line
from fourfold.base.hub import WAYS_OUT, endpoint, is_offline
from fourfold.base.modelscope import fetch_model, use_modelscope
from fourfold.config.model import ModelConfig
from fourfold.config.paths import MODEL, is_gguf, missing

INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def model_name(config: ModelConfig, *, weights: bool = True) -> str:
    """The hub id, folder or file of the base model; a local one exists. What ModelScope's hub has is one.

    Args:
        weights: of a model of ModelScope's hub, fetch them too.
    Raises:
        ConfigError: the config names none, or ModelScope's hub does not give it.
        ModelError: a local path does not exist.
    """
    if not config.model_name_or_path:
        raise ConfigError("model_name_or_path: no model is given. Name a hub id, a local folder or a .gguf file.")
    name = config.model_name_or_path
    check_source(name)
    if not use_modelscope():
        return name
    options = {"cache_dir": config.cache_dir, "token": config.ms_hub_token, "weights": weights}
    return fetch_model(name, MODEL, revision=config.model_revision, **options)


def check_source(name: str, key: str = MODEL) -> None:
    """Refuse a local path that does not exist, before a library takes it for a hub id.

    Raises:
        ModelError: there is nothing at the path.
    """
    if problem := missing(name, key):
        raise ModelError(problem)


def gguf_path(name: str) -> Path | None:
    """The path of a model that is a GGUF file, None for any other."""
    return Path(name).expanduser() if is_gguf(name) else None


def fetch_file(name: str, file: str, config: ModelConfig, *, revision: str | None = None) -> Path | None:
    """A file of a local folder or of the hub; None if there is no such file."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        path = hf_hub_download(name, file, revision=revision, cache_dir=config.cache_dir, token=config.hf_hub_token)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError):
        return None
    return Path(path)


def weight_files(config: ModelConfig) -> list[Path]:
    """The safetensors files of the base model, fetched if need be.

    Raises:
        OSError: there are none.
    """
    name = model_name(config)
    options = {key: value for key, value in hub_options(config).items() if key != "trust_remote_code"}
    index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **options)
    if index is None:
        single = cached_file(name, _SINGLE, **options)
        assert single is not None
        return [Path(single)]
    files, _ = get_checkpoint_shard_files(name, index, **options)
    return [Path(file) for file in files]


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments that every `from_pretrained` of Transformers takes."""
    return {
        "revision": config.model_revision,
        "cache_dir": config.cache_dir,
        "token": config.hf_hub_token,
        "trust_remote_code": config.trust_remote_code,
    }


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
"""Files of which a folder with a tokenizer has one."""
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_CONVERT = (
    "Convert them, and copy the tokenizer's files: python -c \"from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
)
"""Unpickling runs what a file says, so it is left to whoever trusts it."""


@contextmanager
def explained(name: str, what: str, key: str = MODEL) -> Iterator[None]:
    """Turn the errors of a library's loader into one line that names the model.

    Args:
        what: what is being loaded, e.g. "the tokenizer".
    Raises:
        ModelError: in place of OSError, ValueError, ImportError, KeyError and the errors of damaged weights.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        reason = first_line(error)
        folder = Path(name).expanduser()
        if "trust_remote_code" in str(error):
            advice = "It needs Python code that comes with it: set trust_remote_code: true if you trust its author."
        elif folder.exists():
            advice = "Check that the folder is complete."
            if what == "the tokenizer" and folder.is_dir() and not _holds(folder, _TOKENIZERS):
                reason = f"the folder has none of {', '.join(_TOKENIZERS)}"
            elif what == "the model" and _holds(folder, _PICKLED) and not any(folder.glob("*.safetensors")):
                reason = "the folder holds pickled weights only (.bin), and safetensors files are read"
                advice = _CONVERT.format(folder=folder)
        elif is_offline():
            raise ModelError(
                f"{key}: {what} of {name} is not in the cache, there is no such folder, and the hub is not asked "
                f"(HF_HUB_OFFLINE is set, or {endpoint()} cannot be reached). {WAYS_OUT}"
            ) from error
        else:
            advice = f"Check the name. {WAYS_OUT}"
        raise ModelError(f"{key}: {what} of {name} cannot be loaded ({reason}). {advice}") from error


def _holds(folder: Path, files: Sequence[str]) -> bool:
    """Whether a folder has one of some files."""
    return any((folder / file).exists() for file in files)
