"""YAML as version 1.2 reads it: `5e-05` is a number and `no` is text; a key given twice is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

INT = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
NULL = re.compile(r"~|null|Null|NULL|")

Resolvers = dict[str | None, list[tuple[str, re.Pattern[str]]]]


def _core_schema() -> Resolvers:
    """First character of a plain scalar -> the tags it may have; YAML tries them in order."""

    def anchored(pattern: re.Pattern[str]) -> re.Pattern[str]:
        return re.compile(f"^(?:{pattern.pattern})$")

    rules = (
        ("tag:yaml.org,2002:bool", anchored(BOOL), "tTfF"),
        ("tag:yaml.org,2002:int", anchored(INT), "-+0123456789"),
        ("tag:yaml.org,2002:float", anchored(FLOAT), "-+0123456789."),
        ("tag:yaml.org,2002:null", anchored(NULL), "~nN"),
        ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), "<"),
    )
    found: Resolvers = {"": [(rules[3][0], rules[3][1])]}
    for tag, pattern, starts in rules:
        for start in starts:
            found.setdefault(start, []).append((tag, pattern))
    return found


def _constructors() -> dict[Any, Any]:
    """Tag -> what makes a value of it; numbers as YAML 1.2 writes them (PyYAML takes 010 for octal)."""
    own = {
        "tag:yaml.org,2002:int": lambda _, node: int(node.value),
        "tag:yaml.org,2002:float": lambda _, node: to_float(node.value),
    }
    return {**yaml.SafeLoader.yaml_constructors, **own}


def to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Loader(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2: `5e-05` is a number and `no` is text; a key given twice is an error."""

    yaml_implicit_resolvers = _core_schema()
    yaml_constructors = _constructors()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name.value!r} is given twice", name.start_mark
                    )
                seen.add(name.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML text. Raises: yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)
