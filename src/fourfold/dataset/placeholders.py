"""Words in double braces that stand for something the config says, such as `{{name}}` in an identity set.

What counts as a placeholder is decided per data set, never per row, since `{{name}}` is also ordinary text in rows
about templates and code:

- an entry with `placeholders` says it: these words are filled, from `dataset_vars` or else its defaults, and no
  others; an empty mapping leaves every row as it is;
- without it, `name`, `author` and the words of `dataset_vars` are placeholders if at least one row in twenty holds
  one of them in prose. A row that shows code (a code block, `{{` in back-quotes, tags of HTML or Jinja) is not prose.

Only `{{word}}` without blanks is ever filled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.dataset.info import DatasetEntry

log = get_logger(__name__)

CONVENTIONAL = ("name", "author")
EXAMINED_ROWS = 1000
_SHARE = 0.05
_PLACEHOLDER = re.compile(r"\{\{([A-Za-z_]\w*)\}\}")
_CODE = re.compile(r"```|`[^`\n]*\{\{|\{%|\{\{\s|</?[A-Za-z][^<>\n]*>")


@dataclass(frozen=True, slots=True)
class Filler:
    """Fills the placeholders of one data set; with no values it changes nothing."""

    values: Mapping[str, str]

    def fill(self, value: Any) -> Any:
        """The same JSON value with every placeholder in its texts replaced."""
        if not self.values:
            return value
        if isinstance(value, str):
            return _PLACEHOLDER.sub(self._replace, value) if "{{" in value else value
        if isinstance(value, list):
            return [self.fill(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self.fill(entry) for key, entry in value.items()}
        return value

    def _replace(self, match: re.Match[str]) -> str:
        return self.values.get(match[1], match[0])


def settle_filler(entry: DatasetEntry, rows: Sequence[Any], variables: Mapping[str, Any]) -> Filler:
    """Which placeholders the rows of a data set have, and what fills them.

    Args:
        rows: some raw rows from all over the data set, at most EXAMINED_ROWS.
        variables: `dataset_vars`.
    Raises:
        ConfigError: a placeholder has no value; the message shows the line to add.
    """
    values = {word: str(value) for word, value in variables.items()}
    if entry.placeholders is not None:
        declared = {word: values.get(word, default) for word, default in entry.placeholders.items()}
        return _complete(entry, declared)
    words = dict.fromkeys((*CONVENTIONAL, *values))
    found = [_words_in(row) & words.keys() for row in rows if not _shows_code(row)]
    holding = [each for each in found if each]
    if not holding:
        return Filler({})
    if len(holding) < _SHARE * len(rows):
        log.info(
            "dataset %s: %d of %d rows looked at hold %s; they are left as they are. To fill them, list the words "
            "under `placeholders` of its entry in dataset_info.json.",
            entry.name,
            len(holding),
            len(rows),
            " or ".join(f"{{{{{word}}}}}" for word in sorted(set().union(*holding))),
        )
        return Filler({})
    used = set().union(*holding)
    return _complete(entry, {word: values.get(word) for word in words if word in used or word in values})


def _complete(entry: DatasetEntry, values: Mapping[str, str | None]) -> Filler:
    if missing := [word for word, value in values.items() if value is None]:
        line = ", ".join(f"{word}: ..." for word in values)
        raise ConfigError(
            f"dataset_vars: data set {entry.name!r} has the placeholders "
            f"{', '.join(f'{{{{{word}}}}}' for word in missing)} and nothing fills them. Add this line to the config: "
            f'dataset_vars: {{{line}}} (or, if they are meant as they stand, `"placeholders": {{}}` to the data '
            "set's entry)."
        )
    return Filler({word: value for word, value in values.items() if value is not None})


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for entry in value for text in _texts(entry)] if isinstance(value, list) else []


def _words_in(row: Any) -> set[str]:
    return {word for text in _texts(row) if "{{" in text for word in _PLACEHOLDER.findall(text)}


def _shows_code(row: Any) -> bool:
    texts = _texts(row)
    return any("{{" in text for text in texts) and any(_CODE.search(text) for text in texts)
