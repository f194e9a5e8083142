"""Where keys come from: YAML and JSON files and the words of a command line, as plain mappings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fourfold.base.errors import ConfigError
from fourfold.config.schema import Key, table
from fourfold.config.yaml12 import BOOL, FLOAT, INT, NULL, parse_yaml, to_float


def _parse_json(text: str) -> Any:
    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (name, _) in enumerate(pairs):
            if name in (earlier for earlier, _ in pairs[:index]):
                raise ValueError(f"{name!r} is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=no_repeats)


def read_file(path: Path) -> dict[str, Any]:
    """Read a mapping from a .yaml, .yml or .json file.

    Raises:
        ConfigError: no such file, another kind of file, bad syntax (with the line), or not a mapping.
    """
    if (path / "config.json").exists():
        raise ConfigError(f"{path}: is a model, not a config file. Give it as model_name_or_path={path}.")
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: a config file ends in .yaml, .yml or .json. Rename it, or give keys as key=value.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"{path}: {reason}. Check the path; it is taken from {Path.cwd()}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    try:
        content = _parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: bad JSON, {error.msg}: {line!r}. Correct this line."
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: bad YAML, {error.problem or error.context}. Correct this line.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}. Correct the file.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not keys. Write lines of the form `key: value`.")
    return {str(name): value for name, value in content.items()}


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Join two sources; the second wins, key by key also within mappings."""
    joined = dict(first)
    for name, value in second.items():
        earlier = joined.get(name)
        both = isinstance(earlier, Mapping) and isinstance(value, Mapping)
        joined[name] = merge(earlier, value) if both else value  # pyright: ignore[reportArgumentType]
    return joined


def read_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Turn words of a command line, or keys given in Python, into a mapping.

    Raises:
        ConfigError: a word that is neither `key=value` nor `--key`, or a key without its value.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else _pairs(overrides)
    found: dict[str, Any] = {}
    for name, value in pairs:
        for part in reversed(name.split(".")[1:]):
            value = {part: value}
        found = merge(found, {name.split(".")[0]: value})
    return found


def _pairs(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    problems: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals and not word.startswith("--"):
            problems.append(f"{word}: is neither key=value nor --key value. Write a list with commas, without spaces.")
            continue
        if not name:
            problems.append(f"{word}: names no key. Write key=value, without spaces around the equals sign.")
            continue
        name = name.replace("-", "_")
        key = table().get(name)
        following = words[position] if position < len(words) else None
        if equals:
            pairs.append((name, parse_value(key, text)))
        elif key is None and name.startswith("no_") and _is_flag(table().get(name[3:])):
            pairs.append((name[3:], False))
        elif _is_flag(key) and not (following is not None and _accepts(key, following)):
            pairs.append((name, True))
        elif following is None or following.startswith("--"):
            problems.append(f"{name}: has no value. Write --{name} VALUE or {name}=VALUE.")
        else:
            pairs.append((name, parse_value(key, following)))
            position += 1
    if problems:
        raise ConfigError(problems)
    return pairs


def _is_flag(key: Key | None) -> bool:
    return key is not None and key.kind.is_flag


def _accepts(key: Key | None, word: str) -> bool:
    """Whether the word after a flag is its value, as in `--fp16 false`, and not the next key."""
    if key is None or word.startswith("--") or "=" in word:
        return False
    return key.kind.takes_text or word.lower() in ("true", "false", "yes", "no", "1", "0", *map(str, key.kind.choices))


def parse_value(key: Key | None, text: str) -> Any:
    """A value from a command line, read as YAML would; but what is text for its key stays as it is."""
    kind = None if key is None else key.kind
    if NULL.fullmatch(text) and text:
        return None
    if text.startswith(("[", "{")) and not (kind and kind.types == {str}):
        try:
            return parse_yaml(text)
        except yaml.YAMLError:
            return text
    if kind and BOOL.fullmatch(text) and bool in kind.types:
        return text.lower() == "true"
    if kind and (kind.takes_text or tuple in kind.types):
        return text
    for pattern, convert in ((BOOL, lambda word: word.lower() == "true"), (INT, int)):
        if pattern.fullmatch(text):
            return convert(text)
    if FLOAT.fullmatch(text):
        return to_float(text)
    return text
