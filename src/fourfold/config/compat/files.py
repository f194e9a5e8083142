"""Reading the config files of other tools, which a key names or holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fourfold.config.key import NoCounterpart
from fourfold.config.yaml12 import parse_yaml


def read_mapping(value: Any) -> Mapping[str, Any]:
    """A mapping as it is, or the one in a JSON or YAML file.

    Raises:
        NoCounterpart: no such file, bad syntax (with the line), or not a mapping; begins in lower case, ends in a stop.
    """
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, str | Path):
        raise NoCounterpart(f"{value!r} is neither a file nor a mapping. Give the path of a file.")
    path = Path(value)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NoCounterpart(
            f"{path} cannot be read ({error.strerror}). Check the path; it is taken from {Path.cwd()}."
        ) from error
    try:
        content = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except json.JSONDecodeError as error:
        raise NoCounterpart(f"{path}, line {error.lineno}: bad JSON, {error.msg}. Correct this line.") from error
    except yaml.YAMLError as error:
        raise NoCounterpart(f"{path}: bad YAML, {' '.join(str(error).split())}. Correct it.") from error
    if not isinstance(content, Mapping):
        raise NoCounterpart(f"{path} holds no keys. Give a file with a mapping.")
    return content
