"""ModelScope's hub in place of Hugging Face's, where `USE_MODELSCOPE_HUB` asks for it, as LLaMA-Factory does.

Models are fetched whole by the package `modelscope`, and are local folders from then on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fourfold.base.cache import cache_root
from fourfold.base.errors import ConfigError, DataError, first_line
from fourfold.base.log import get_logger

log = get_logger(__name__)

_VARIABLE, _OPENMIND = "USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB"
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]


def use_modelscope() -> bool:
    """Whether models and data sets are taken from ModelScope's hub."""
    return _is_on(_VARIABLE)


def tell_other_hubs() -> None:
    """Warn of a hub that is asked for and not supported."""
    if _is_on(_OPENMIND):
        log.warning(
            "%s: the Modelers hub is not supported; models and data sets come from Hugging Face's hub or from a "
            "folder. Download them and give their folders, or use %s=1.",
            _OPENMIND,
            _VARIABLE,
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() in ("true", "y", "1")


def fetch_model(
    name: str, key: str, *, revision: str = "main", cache_dir: str | None, token: str | None, weights: bool = True
) -> str:
    """The local folder of a model or an adapter; one that exists already is fetched by nobody.

    Processes of one machine wait for each other.

    Args:
        key: that names it, for messages.
        revision: branch or tag; `main` is called `master` there.
        weights: fetch them too.
    Raises:
        ConfigError: the package is not installed, or cannot fetch it.
    """
    if Path(name).expanduser().exists():
        return name
    snapshot_download = _of_package("snapshot_download")
    from filelock import FileLock

    options: dict[str, Any] = {} if weights else {"ignore_file_pattern": _WEIGHTS}
    if token is not None:
        options["token"] = token
    lock = cache_root() / "modelscope.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    revision = "master" if revision == "main" else revision
    try:
        with FileLock(lock):
            folder = snapshot_download(name, revision=revision, cache_dir=cache_dir, **options)
    except Exception as error:  # the package's own kinds, those of requests, and OSError
        raise ConfigError(
            f"{key}: {name} cannot be fetched from ModelScope ({first_line(error).rstrip('.')}). Check the name, or "
            f"give a local folder; without {_VARIABLE} it is looked for on Hugging Face's hub."
        ) from error
    log.info("%s: %s is taken from ModelScope's hub, and lies at %s", key, name, folder)
    return str(folder)


def load_data_set(
    name: str, *, subset: str | None, folder: str | None, split: str, cache_dir: str | None, token: str | None,
    streaming: bool,
) -> Any:  # fmt: skip
    """A split of a data set, as one of the `datasets` library.

    Raises:
        ConfigError: the package is not installed.
        DataError: it cannot be loaded.
    """
    data_set = _of_package("MsDataset")
    options = {} if cache_dir is None else {"cache_dir": cache_dir}
    try:
        found = data_set.load(
            dataset_name=name,
            subset_name=subset,
            data_dir=folder,
            split=split,
            token=token,
            use_streaming=streaming,
            **options,
        )
        return found.to_hf_dataset() if isinstance(found, data_set) else found
    except Exception as error:  # as in fetch_model
        raise DataError(
            f"the data set cannot be loaded from ModelScope ({first_line(error).rstrip('.')}). Check ms_hub_url, "
            "subset and split; or download it and name it with file_name.",
            file=name,
        ) from error


def _of_package(name: str) -> Any:
    try:
        import modelscope  # pyright: ignore[reportMissingImports]

        return getattr(modelscope, name)
    except ImportError as error:
        raise ConfigError(
            f"{_VARIABLE}: ModelScope's hub needs the package modelscope ({first_line(error)}). Run `pip install "
            f"modelscope`, or unset {_VARIABLE}."
        ) from error
