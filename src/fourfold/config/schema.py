"""All keys in one place: the sections, the table of keys, and the run composed of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any

from fourfold.base import registry
from fourfold.config.compat.sections import COMPAT
from fourfold.config.data import DataConfig
from fourfold.config.export import ExportConfig
from fourfold.config.generation import GenerationConfig
from fourfold.config.key import KeySpec, Section, spec_of
from fourfold.config.kind import Kind
from fourfold.config.model import ModelConfig
from fourfold.config.output import OutputConfig
from fourfold.config.parallel import ParallelConfig
from fourfold.config.preference import PreferenceConfig
from fourfold.config.reinforcement import ReinforcementConfig
from fourfold.config.training import TrainingConfig
from fourfold.config.tuning import TuningConfig

SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "model": ModelConfig,
        "data": DataConfig,
        "tuning": TuningConfig,
        "training": TrainingConfig,
        "output": OutputConfig,
        "generation": GenerationConfig,
        "preference": PreferenceConfig,
        "reinforcement": ReinforcementConfig,
        "parallel": ParallelConfig,
        "export": ExportConfig,
    }
)
"""Attribute of Run -> its section."""

NESTED = "parallel"
"""The one key whose value is a mapping of keys."""


@dataclass(frozen=True, slots=True)
class Key:
    """One row of the table of keys.

    Attributes:
        name: as the user writes it, e.g. `cutoff_len` or `parallel.tp`.
        section: the class that declares it; `field` is its attribute there.
        group: heading it is listed under.
        spec: its help, status and so on.
        kind: its type, choices and whether it may be null.
        default: value when it is not given.
    """

    name: str
    section: type[Section]
    field: str
    group: str
    spec: KeySpec
    kind: Kind
    default: Any

    def choices(self) -> list[str]:
        """The valid values of a key that has a closed or an open list of them, else empty."""
        if self.spec.folder is None:
            return list(self.kind.choices)
        listed = registry.names(self.spec.folder.package, self.spec.folder.suffix)
        return sorted({*listed, *self.spec.also})


@cache
def table() -> Mapping[str, Key]:
    """Every key by name: Fourfold's sections first, then other tools' keys that are mapped or refused."""
    found: dict[str, Key] = {}
    for section in (*SECTIONS.values(), *COMPAT):
        for attribute, info in section.model_fields.items():
            spec = spec_of(info)
            name = f"{NESTED}.{attribute}" if attribute in section.NESTED else attribute
            assert name not in found, f"{name} is declared twice"
            default = info.get_default(call_default_factory=True)
            kind = Kind.of(info.annotation)
            found[name] = Key(name, section, attribute, spec.group or section.title, spec, kind, default)
    return MappingProxyType(found)


def groups(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Keys by group, both in the order of declaration."""
    found: dict[str, list[Key]] = {}
    for key in keys:
        found.setdefault(key.group, []).append(key)
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """The config of one run: every section, checked and frozen.

    Attributes:
        source: the keys as the user gave them, files and overrides joined.
        notes: one line for each key that was mapped or whose feature comes later, to be logged.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reinforcement: ReinforcementConfig = field(default_factory=ReinforcementConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    source: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def flat(self, *, secrets: bool = False) -> dict[str, Any]:
        """All keys with their values as a config file would hold them.

        Args:
            secrets: also tokens and the like; never write or show such a result.

        What `load` makes of it equals this run, but for `source` and `notes`.
        """
        values: dict[str, Any] = {}
        nested: dict[str, Any] = {}
        for attribute, section in SECTIONS.items():
            dumped = getattr(self, attribute).model_dump(mode="json")
            for name, info in section.model_fields.items():
                if secrets or not spec_of(info).secret:
                    (nested if name in section.NESTED else values)[name] = dumped[name]
        return {**values, NESTED: nested}


assert [f.name for f in fields(Run)][: len(SECTIONS)] == list(SECTIONS)

_WORD = re.compile(r"[a-z][a-z0-9_.]*")


def named_keys(text: str) -> set[str]:
    """The keys that a message speaks of."""
    return {word.rstrip(".") for word in _WORD.findall(text)} & set(table())
