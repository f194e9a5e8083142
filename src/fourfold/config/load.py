"""From files, mappings and command-line words to a Run; every problem is found before any is raised."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.config.derive import derive
from fourfold.config.idle import idle_keys
from fourfold.config.key import NoCounterpart, Section, Status
from fourfold.config.problems import invalid, shown, unknown_key
from fourfold.config.rules import Verb, contradictions, requirements
from fourfold.config.schema import COMPAT, NESTED, SECTIONS, Key, Run, named_keys, table
from fourfold.config.sources import merge, read_file, read_overrides

Source = str | Path | Mapping[str, Any]


def load(source: Source | None, overrides: Sequence[str] | Mapping[str, Any] = (), *, verb: Verb | None = None) -> Run:
    """Load and check a config.

    Args:
        source: a YAML or JSON file, or the keys themselves; None for no file.
        overrides: `key=value`, `--key value`, `--key=value` and `--flag` words, or a mapping; a later one wins.
        verb: also check what this verb needs, as `rules.check` does.
    Raises:
        ConfigError: with every problem of the keys, their values and their combination.
    """
    if source is None:
        given: Mapping[str, Any] = {}
    else:
        given = read_overrides(source) if isinstance(source, Mapping) else read_file(Path(source))
    given = merge(given, read_overrides(overrides))
    loader = _Loader()
    flat = loader.resolve(given)
    sections = {name: loader.section(section, flat) for name, section in SECTIONS.items()}
    run = Run(**sections, source=given, notes=tuple(loader.notes))  # type: ignore[arg-type]
    run = _fill(run)
    run = replace(run, notes=(*run.notes, *idle_keys(run, verb)))
    found = [*contradictions(run), *(requirements(run, verb) if verb else ())]
    loader.problems += [problem for problem in found if not named_keys(problem) & loader.bad]
    if loader.problems:
        raise ConfigError(loader.problems)
    return run


def _fill(run: Run) -> Run:
    """The run with its dependent defaults."""
    values = derive(run)
    changed: dict[str, Section] = {}
    for attribute, section in SECTIONS.items():
        mine = {name: value for name, value in values.items() if name in section.model_fields}
        if mine:
            changed[attribute] = getattr(run, attribute).model_copy(update=mine)
    return replace(run, **changed)  # type: ignore[arg-type]


@dataclass(slots=True)
class _Loader:
    """Collects what is found while the keys are sorted into their sections."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Our own keys with the values given for them, other tools' keys replaced by what they map to."""
        flat = self._known(given)
        for section in COMPAT:
            asked = self.section(section, flat)
            for name in sorted(asked.model_fields_set, key=list(section.model_fields).index):
                flat.pop(name)
                if getattr(asked, name) != table()[name].default:
                    self._map(table()[name], getattr(asked, name), flat)
        return flat

    def section(self, section: type[Section], flat: Mapping[str, Any]) -> Any:
        """A section of the keys that are its own; what is not valid is noted and left at its default."""
        keys = {key.field: key for key in table().values() if key.section is section}
        values: dict[str, Any] = {}
        for attribute, key in keys.items():
            if key.name in flat and self._chosen(key, flat[key.name], attribute, values):
                self._note_later(key, values[attribute])
        try:
            return section.model_validate(values)
        except ValidationError as error:
            wrong = {str(one["loc"][0]): one for one in reversed(error.errors())}
        for attribute in sorted(wrong, key=list(keys).index):
            self._bad(keys[attribute], invalid(keys[attribute], values[attribute], wrong[attribute]))
        return section.model_validate({name: value for name, value in values.items() if name not in wrong})

    def _known(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given keys flat (`parallel.tp`), without those that do not exist."""
        flat: dict[str, Any] = {}
        for name, value in given.items():
            if name == NESTED:
                if isinstance(value, Mapping):
                    flat |= {f"{NESTED}.{inner}": setting for inner, setting in value.items()}
                elif value is not None:
                    self.problems.append(
                        f"{NESTED}: {value!r} is not a mapping. Write parallel.tp=2, or tp: 2 below it."
                    )
            else:
                flat[name] = value
        tolerant = os.environ.get("ALLOW_EXTRA_ARGS", "").lower() in ("1", "true", "y", "yes")
        for name in [name for name in flat if name not in table()]:
            del flat[name]
            if tolerant:
                self.notes.append(f"{unknown_key(name)} It was left out, since ALLOW_EXTRA_ARGS is set.")
            else:
                self.problems.append(unknown_key(name))
        return flat

    def _chosen(self, key: Key, value: Any, attribute: str, values: dict[str, Any]) -> bool:
        """Put `value` into `values`, renamed if need be; False if it is not among the key's choices."""
        if tuple in key.kind.types and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple):
            values[attribute] = [self._choice(key, part) for part in value]
        else:
            values[attribute] = self._choice(key, value)
        if key.name in self.bad:
            del values[attribute]
        return attribute in values

    def _choice(self, key: Key, value: Any) -> Any:
        """One value of a key: renamed, refused, or matched to the key's choices."""
        text = "no" if value is False and "no" in key.kind.choices and not key.kind.is_flag else str(value)
        if text in key.spec.refused:
            self._bad(key, f"{key.name}: {text!r} is refused. {key.spec.refused[text]}")
        elif text in key.spec.renamed:
            self.notes.append(f"{key.name}: {text} is taken for {key.spec.renamed[text]}")
            return key.spec.renamed[text]
        elif key.spec.folder is not None and isinstance(value, str) and value:
            if value not in key.choices():
                valid = [*key.choices(), *key.spec.renamed]
                self._bad(key, registry.unknown(key.name, value, valid, advice=key.spec.otherwise))
        elif key.kind.values:
            if text in key.kind.choices:
                return key.kind.values[key.kind.choices.index(text)]
            if value is not None and not key.kind.is_flag:
                self._bad(key, registry.unknown(key.name, text, key.kind.choices))
        return value

    def _note_later(self, key: Key, value: Any) -> None:
        if value == key.default or key.section not in SECTIONS.values():
            return
        if key.spec.status is Status.LATER:
            self.notes.append(
                f"{key.name}: {shown(key, value)} is accepted but without effect yet; it comes with {key.spec.note}"
            )
        elif key.spec.status is Status.MAPPED:
            self.notes.append(f"{key.name}: {key.spec.note}")

    def _map(self, key: Key, value: Any, flat: dict[str, Any]) -> None:
        """Replace another tool's key, given a value other than its default, by ours."""
        if key.spec.status is Status.REFUSED:
            self._bad(key, f"{key.name}: {shown(key, value)} is refused. {key.spec.note}")
            return
        if key.spec.status is Status.LATER:
            self.notes.append(
                f"{key.name}: {shown(key, value)} is accepted but without effect yet; it comes with {key.spec.note}"
            )
            return
        if key.spec.to is None:
            self.notes.append(f"{key.name}: {shown(key, value)} changes nothing; {key.spec.note}")
            return
        try:
            translation = key.spec.to(value)
        except NoCounterpart as error:
            self._bad(key, f"{key.name}: {error}")
            return
        for name, setting in translation.values.items():
            if flat.setdefault(name, setting) != setting:
                meant = f"{key.name}: {shown(key, value)} means {name}: {shown(key, setting)}"
                self._bad(key, f"{meant}, but {name} is {shown(key, flat[name])}. Remove one of the two.")
        listed = ", ".join(f"{name}: {shown(key, setting)}" for name, setting in translation.values.items())
        self.notes.append(f"{key.name}: {shown(key, value)} is taken for {listed or 'the default'}")
        self.notes += [f"{key.name}: {note}" for note in translation.notes]

    def _bad(self, key: Key, problem: str) -> None:
        self.bad.add(key.name)
        self.problems.append(problem)
