"""Writing a plan's keys into the user's own file, and leaving the rest of it as it is, comments too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fourfold.base.errors import ConfigError, PlanError
from fourfold.config.load import load
from fourfold.config.schema import NESTED
from fourfold.planning.config_lines import config_lines
from fourfold.planning.layout import Layout, resolve_layout

_TOP_KEY = re.compile(r"([A-Za-z_][\w.]*)\s*:")
_INNER_KEY = re.compile(r"(\s+)([A-Za-z_]\w*)\s*:")


def write_config(file: Path, keys: dict[str, Any], layout: Layout) -> None:
    """Put keys into a YAML or JSON file, replacing those that it has.

    What comes of it is loaded before the file is touched, and must give the layout that was planned.

    Args:
        keys: strategy, the mapping `parallel` and micro_batch_tokens, as `config_of` makes them.
        layout: what they stand for.
    Raises:
        PlanError: the file cannot be written, or would not give this layout; it is left as it was.
    """
    text = file.read_text(encoding="utf-8-sig")
    changed = with_keys_json(text, keys) if file.suffix == ".json" else with_keys_yaml(text, keys)
    unfinished = file.with_name(f".{file.stem}.planned{file.suffix}")
    try:
        unfinished.write_text(changed, encoding="utf-8")
        _check(unfinished, file, layout)
        unfinished.replace(file)
    except OSError as error:
        raise PlanError(f"write: {file} cannot be written ({error}). Put the lines in by hand.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _check(written: Path, file: Path, layout: Layout) -> None:
    try:
        found = resolve_layout(load(written).parallel, layout.world_size)
    except (ConfigError, PlanError) as error:
        raise PlanError(
            f"write: {file} has keys that contradict the plan and was left as it is:\n{error}\nRemove them, or put the "
            "lines in by hand."
        ) from error
    if found != layout:
        raise PlanError(
            f"write: {file} has keys that change the plan ({found.describe()} instead of {layout.describe()}) and was "
            "left as it is. Remove its other keys of the layout, or put the lines in by hand."
        )


def with_keys_json(text: str, keys: dict[str, Any]) -> str:
    """JSON with keys put in; indented as it was, as far as two or four spaces go."""
    values = json.loads(text)
    flat = {name: value for name, value in keys.items() if name != NESTED}
    values = {name: value for name, value in values.items() if not name.startswith(f"{NESTED}.")} | flat
    values[NESTED] = {**_dotted(json.loads(text)), **(values.get(NESTED) or {}), **keys[NESTED]}
    indent = re.search(r"\n( +)\S", text)
    return json.dumps(values, indent=len(indent[1]) if indent else 2, ensure_ascii=False) + "\n"


def _dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Keys written as `parallel.tp` at the top."""
    start = f"{NESTED}."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def with_keys_yaml(text: str, keys: dict[str, Any]) -> str:
    """YAML with lines replaced in place, and those that are new at the end; comments stay."""
    lines = text.splitlines()
    missing = dict(keys)
    for name, value in keys.items():
        if name != NESTED and (at := _find(lines, name)) is not None:
            lines[at] = _replaced(lines[at], name, value)
            del missing[name]
    inner = dict(keys[NESTED])
    for name in list(inner):
        if (at := _find(lines, f"{NESTED}.{name}")) is not None:
            lines[at] = _replaced(lines[at], f"{NESTED}.{name}", inner.pop(name))
    start = _find(lines, NESTED)
    if start is None:
        missing[NESTED] = inner
    else:
        del missing[NESTED]
        lines = _into_block(lines, start, inner)
    if not missing.get(NESTED, True):
        del missing[NESTED]
    if missing:
        while lines and not lines[-1].strip():
            lines.pop()
        lines += ["", *config_lines(missing)] if lines else config_lines(missing)
    return "\n".join(lines) + "\n"


def _find(lines: list[str], name: str) -> int | None:
    """The line on which a top key stands."""
    found = (number for number, line in enumerate(lines) if (key := _TOP_KEY.match(line)) and key[1] == name)
    return next(found, None)


def _replaced(line: str, name: str, value: Any, indent: str = "") -> str:
    """A line with another value and the comment that it had."""
    comment = re.search(r"\s+#.*$", line)
    (new,) = config_lines({name: value})
    return f"{indent}{new}{comment[0] if comment else ''}"


def _into_block(lines: list[str], start: int, inner: dict[str, Any]) -> list[str]:
    """The mapping `parallel:` with keys replaced or added; one in braces is written anew as a block."""
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " \t#"):
        end += 1
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1  # what stands before the next key belongs to that
    head = lines[start]
    block = lines[start + 1 : end]
    if "{" in head:
        block, head = _unfolded("\n".join([head, *block])), f"{NESTED}:"
    indent = next((key[1] for line in block if (key := _INNER_KEY.match(line))), "  ")
    left = dict(inner)
    for number, line in enumerate(block):
        key = _INNER_KEY.match(line)
        if key and key[2] in left:
            block[number] = _replaced(line, key[2], left.pop(key[2]), indent)
    block += [f"{indent}{line}" for line in config_lines(left)]
    return [*lines[:start], head, *block, *lines[end:]]


def _unfolded(text: str) -> list[str]:
    """The lines of a mapping that was written in braces."""
    from fourfold.config.yaml12 import parse_yaml

    values = parse_yaml(text)[NESTED]
    return [f"  {line}" for line in config_lines(values)]
