"""Shapes of models that were seen before, kept as JSON, so that planning needs neither torch nor Transformers.

The key is a hash of everything that a shape is made from: the model's config.json (of a GGUF file, its first bytes and
its length), the code that reads shapes, and the versions of Transformers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from fourfold.base.cache import cache_root
from fourfold.config.model import ModelConfig
from fourfold.config.paths import is_gguf
from fourfold.planning.shape import FORMAT, ModelShape

_CODE = (
    ("fourfold.base", "delta_chunks.py"),
    ("fourfold.base", "delta_rule.py"),
    ("fourfold.base", "delta_rule_use.py"),
    ("fourfold.planning", "read_shape.py"),
    ("fourfold.families", "tensor_styles.py"),
    ("fourfold.families", "composite.py"),
    ("fourfold.families", "decoder.py"),
    ("fourfold.families", "experts.py"),
    ("fourfold.families", "recurrent.py"),
    ("fourfold.families", "shared_positions.py"),
)
_GGUF_HEAD = 2**24  # metadata and the list of tensors; what follows are weights


def find_shape(config: ModelConfig, read: Callable[[], ModelShape]) -> ModelShape:
    """The shape of a model: from the cache if this very model was seen before, else read and kept.

    A cache that cannot be written is no error: the shape is read again next time.

    Args:
        read: reads the shape with torch; its errors pass through.
    """
    content = model_content(config)
    known = None if content is None else _load(_file(content))
    if known is not None:
        return known
    shape = read()
    content = content or model_content(config)  # a hub's file is in its cache by now
    if content is not None:
        _save(_file(content), shape)
    return shape


def model_content(config: ModelConfig) -> bytes | None:
    """What a model's shape follows from; None for a hub's model that was not fetched yet."""
    name = config.model_name_or_path or ""
    path = Path(name).expanduser()
    with suppress(OSError):
        if is_gguf(name):
            with path.open("rb") as file:
                return file.read(_GGUF_HEAD) + str(path.stat().st_size).encode()
        file = path / "config.json" if path.is_dir() else _fetched(config)
        return None if file is None else file.read_bytes()
    return None


def _fetched(config: ModelConfig) -> Path | None:
    """The config.json of a hub's model in the hub's cache, without importing its library.

    Folders as in its documentation ("Understand caching"): models--OWNER--NAME/refs/REVISION names the snapshot.
    """
    folder = _hub_cache(config) / f"models--{(config.model_name_or_path or '').replace('/', '--')}"
    revision = config.model_revision
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    file = folder / "snapshots" / commit / "config.json"
    return file if file.is_file() else None


def _hub_cache(config: ModelConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _file(content: bytes) -> Path:
    digest = xxhash.xxh3_128(content)
    digest.update(f"{FORMAT} {importlib.metadata.version('transformers')}".encode())
    for package, name in _CODE:
        digest.update((importlib.resources.files(package) / name).read_bytes())
    return cache_root() / "shapes" / f"{digest.hexdigest()}.json"


def _load(file: Path) -> ModelShape | None:
    """What is kept there; None if there is nothing, or something damaged."""
    try:
        return ModelShape.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _save(file: Path, shape: ModelShape) -> None:
    """Write under another name, then rename, so that another process never reads half of it."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(shape.as_json()), encoding="utf-8")
        unfinished.replace(file)
