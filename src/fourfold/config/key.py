"""How a key is declared: one line in a section gives its name, type, default, range, help and status.

Everything that speaks of keys (the loader, `fourfold help`, docs/config.md) is made from these declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from fourfold.config.yaml12 import parse_yaml


class Status(StrEnum):
    """What becomes of a key."""

    OBEYED = "obeyed"
    MAPPED = "mapped"
    LATER = "later"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Folder:
    """An open folder whose file names are the valid values of a key, e.g. `Folder("fourfold.objectives")`."""

    package: str
    suffix: str = ".py"


class NoCounterpart(Exception):  # noqa: N818 - says what it is; never seen by a user
    """A value of another tool's key cannot be carried over; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Translation:
    """What another tool's key is turned into.

    Attributes:
        values: our keys by name.
        notes: what has no counterpart and why that does no harm, one line each.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What a key's declaration says beyond its type and default.

    Attributes:
        help: one or two sentences for the user.
        group: heading it is listed under; "" takes the section's own.
        status: what becomes of the key.
        note: for a mapped key what it is mapped to, for a later one what brings it, for a refused one why and
            what to use instead.
        folder: open folder that lists the valid values.
        also: values that are valid besides the folder's names.
        otherwise: what to do with a value that is not among them.
        renamed: values of other tools and the value each is taken for, with a log line.
        refused: values of other tools that are out of scope: why, and what to use instead.
        low, high: bounds of a number, inclusive unless `open_low` / `open_high`.
        secret: never written to a file or a log.
        to: for a mapped key, turns its value into ours; may raise NoCounterpart. None: nothing is to be done.
        blocks: a later key that changes what is learnt, so that training must not go on without it.
    """

    help: str
    group: str = ""
    status: Status = Status.OBEYED
    note: str = ""
    folder: Folder | None = None
    also: tuple[str, ...] = ()
    otherwise: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    secret: bool = False
    to: Callable[[Any], Translation] | None = None
    blocks: bool = False


def key(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    **spec: Any,
) -> Any:
    """Declare a key. The bounds are checked by pydantic; `spec` takes the attributes of KeySpec."""
    said = KeySpec(
        help=help,
        low=gt if ge is None else ge,
        high=lt if le is None else le,
        open_low=gt is not None,
        open_high=lt is not None,
        **spec,
    )
    return Field(default=default, ge=ge, gt=gt, le=le, lt=lt, json_schema_extra={"fourfold": said})  # type: ignore[dict-item]


def later(default: Any, help: str, note: str, **spec: Any) -> Any:
    """Declare a key that the schema accepts and a later version obeys; `note` says what brings it."""
    return key(default, help, status=Status.LATER, note=note, **spec)


def spec_of(info: FieldInfo) -> KeySpec:
    """The declaration behind a field of a section."""
    extra = info.json_schema_extra
    assert isinstance(extra, dict), "every field of a section is declared by key()"
    said = extra["fourfold"]
    assert isinstance(said, KeySpec)
    return said


class Section(BaseModel):
    """A group of keys. Frozen: a run's config never changes after it was loaded."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False
    )
    title: ClassVar[str] = ""
    NESTED: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1; `cutoff_len: true` is a slip, not a one."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if annotation is not Any and "bool" not in str(annotation):
                raise ValueError("true and false are not valid here")
        return value


def _split(value: Any) -> Any:
    """A comma list as tuple of its stripped, non-empty parts."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _split_or_single(value: Any) -> Any:
    """As `_split`, where a single number is a list of one."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else _split(value)


def _mapping(value: Any) -> Any:
    """A mapping that may be given as a string of JSON, YAML or `name=value,name=value`."""
    if not isinstance(value, str):
        return value
    try:
        if "=" in value and not value.lstrip().startswith("{"):
            pairs = (part.partition("=") for part in value.split(",") if part.strip())
            return {name.strip(): parse_yaml(text) for name, _, text in pairs}
        return parse_yaml(value)  # JSON is YAML
    except yaml.YAMLError:
        return value  # not a mapping, as pydantic will say


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Names, given as a list or as a string with commas."""


def _expanded(path: str) -> str:
    """A path with the home folder in place of a leading `~`, which no shell replaces in a config file."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


LocalPath = Annotated[str, AfterValidator(_expanded)]
"""A path of this machine, or a hub id."""

PathList = Annotated[tuple[LocalPath, ...], BeforeValidator(_split)]
"""Paths or hub ids, given as a list or as a string with commas."""

CommaFloats = Annotated[tuple[float, ...], BeforeValidator(_split_or_single)]
"""Numbers, given as a list, as a string with commas, or as a single one."""

Options = Annotated[dict[str, Any], BeforeValidator(_mapping)]
"""A mapping, also as a string of JSON, YAML or `name=value,name=value`."""

Count = int | float
"""A number of steps, or below 1 a share of all steps."""
