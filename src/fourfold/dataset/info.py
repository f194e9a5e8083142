"""What `dataset_info.json` says: where each data set comes from and which columns hold what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from fourfold.base import registry
from fourfold.base.errors import ConfigError, DataError, first_line
from fourfold.base.hub import WAYS_OUT, settle_hub
from fourfold.base.log import get_logger
from fourfold.base.modelscope import use_modelscope

log = get_logger(__name__)

INFO_FILE = "dataset_info.json"
FORMATS_PACKAGE = "fourfold.dataset.formats"
ONLINE = "ONLINE"
REMOTE = "REMOTE:"

_SETTINGS = ("formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags", "placeholders")
_SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_REFUSED = {
    "om_hub_url": "the Modelers hub is not supported",
    "script_url": "loading scripts run code of the data set's author and are not supported",
    "cloud_file_name": "cloud storage is not read directly",
}


Source = Literal["file", "hf_hub", "ms_hub"]


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a row holds what; None where the data set has none.

    The defaults hold only when an entry gives no `columns` at all: with `columns`, what it does not name is None.
    """

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


@dataclass(frozen=True, slots=True)
class Tags:
    """How a message names its role and content. As with `Columns`, the defaults hold only without `tags`."""

    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """One data set of a `dataset_info.json`.

    Attributes:
        name: its name there.
        source: "file", "hf_hub", or "ms_hub" of ModelScope.
        location: path of the file or folder, or the hub id.
        formatting: name of a file in formats/.
        ranking: rows are preference pairs.
        subset: configuration of a hub data set.
        split: split of a hub data set.
        folder: folder of a hub data set.
        num_samples: take this many rows at random (with repetition if there are fewer).
        columns: where the parts of a row are.
        tags: how messages are written.
        placeholders: words that `{{word}}` stands for, with defaults (None: must be given by `dataset_vars`);
            None if the entry does not say (see placeholders.py).
        has_columns: the entry names its columns, so each of them must exist.
    """

    name: str
    source: Source
    location: str
    formatting: str = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)
    placeholders: Mapping[str, str | None] | None = None
    has_columns: bool = False


def load_info(dataset_dir: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path]:
    """The entries of a data folder and the folder that file names in them are relative to.

    Args:
        dataset_dir: a folder with a `dataset_info.json`, `REMOTE:<hub data set>` for one that lies on the Hugging
            Face hub, or the entries themselves.
    Raises:
        ConfigError: the folder or the file is not there.
        DataError: the file is not valid JSON, or not a mapping.
    """
    if isinstance(dataset_dir, Mapping):
        return dataset_dir, Path()
    if str(dataset_dir).startswith(REMOTE):
        path = _remote_info(str(dataset_dir).removeprefix(REMOTE))
    else:
        path = Path(dataset_dir) / INFO_FILE
    if not path.parent.is_dir():
        raise ConfigError(
            f"dataset_dir: there is no folder {str(dataset_dir)!r}. Name the folder that holds {INFO_FILE}."
        )
    if not path.is_file():
        raise ConfigError(f"dataset_dir: {str(dataset_dir)!r} holds no {INFO_FILE}. Add it; docs/data.md shows one.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"bad JSON in line {error.lineno}: {error.msg}. Correct this line.", file=str(path)) from error
    if not isinstance(info, dict):
        raise DataError("must be a mapping of data set names to entries. docs/data.md shows one.", file=str(path))
    return info, path.parent


def _remote_info(repo_id: str) -> Path:
    settle_hub()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, INFO_FILE, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"dataset_dir: {REMOTE}{repo_id}: {INFO_FILE} cannot be fetched ({reason}). Check the name. {WAYS_OUT}"
        ) from error


def find_entries(names: Sequence[str], dataset_dir: str | Path | Mapping[str, Any], *, key: str) -> list[DatasetEntry]:
    """The entries of the named data sets, in order.

    Args:
        key: the config key that names them, for messages.
    Raises:
        ConfigError: unknown names (all of them, with the nearest valid ones) or an entry that is not usable.
    """
    if not names:
        return []
    if dataset_dir == ONLINE:
        hub: Source = "ms_hub" if use_modelscope() else "hf_hub"
        return [DatasetEntry(name=name, source=hub, location=name) for name in names]
    info, base = load_info(dataset_dir)
    if problems := [registry.unknown(key, name, info) for name in names if name not in info]:
        raise ConfigError(problems)
    return [parse_entry(name, info[name], base) for name in names]


def parse_entry(name: str, raw: Any, base: Path) -> DatasetEntry:
    """One entry as a value.

    Args:
        raw: the JSON value of the entry.
        base: folder that `file_name` is relative to.
    Raises:
        ConfigError: no source, an unsupported source or format, columns that are not known, or a wrong type.
    """
    where = f"{INFO_FILE}: entry {name!r}"
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: must be a mapping, not {raw!r}.")
    for unknown in [k for k in raw if k not in (*_SETTINGS, *_SOURCES)]:
        close = registry.nearest(unknown, [*_SETTINGS, *_SOURCES], limit=1)
        log.warning("%s: %r is not a setting.%s", where, unknown, f" Did you mean {close[0]}?" if close else "")
    source, location = _source(where, raw, base)
    formatting = raw.get("formatting", "alpaca")
    if formatting not in (valid := registry.names(FORMATS_PACKAGE)):
        raise ConfigError(f"{where}: {registry.unknown('formatting', str(formatting), valid)}")
    return DatasetEntry(
        name=name,
        source=source,
        location=location,
        formatting=formatting,
        ranking=_typed(where, raw, "ranking", bool, False),
        subset=_typed(where, raw, "subset", str, None),
        split=_typed(where, raw, "split", str, "train"),
        folder=_typed(where, raw, "folder", str, None),
        num_samples=_num_samples(where, raw),
        columns=_columns(where, raw, formatting, location),
        tags=_tags(where, raw, formatting),
        placeholders=_placeholders(where, raw),
        has_columns="columns" in raw,
    )


def _source(where: str, raw: Mapping[str, Any], base: Path) -> tuple[Source, str]:
    # As in LLaMA-Factory: ModelScope where it is in use, or where nothing else is named.
    if raw.get("ms_hub_url") and (use_modelscope() or not raw.get("hf_hub_url")):
        return "ms_hub", str(raw["ms_hub_url"])
    if raw.get("hf_hub_url"):
        return "hf_hub", str(raw["hf_hub_url"])
    for key, reason in _REFUSED.items():
        if raw.get(key):
            raise ConfigError(f"{where}: {key}: {reason}. Download the data and name it with file_name.")
    if not isinstance(file_name := raw.get("file_name"), str) or not file_name:
        raise ConfigError(f"{where}: names no source. Add file_name (a file or folder), hf_hub_url or ms_hub_url.")
    return "file", str(base / file_name)


def _typed(where: str, raw: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = raw.get(key, default)
    if value is not default and not isinstance(value, kind):
        raise ConfigError(f"{where}: {key}: {value!r} is not of type {kind.__name__}.")
    return value


def _num_samples(where: str, raw: Mapping[str, Any]) -> int | None:
    number = _typed(where, raw, "num_samples", int, None)
    if number is not None and number < 1:
        raise ConfigError(f"{where}: num_samples: {number} is not positive.")
    return number


def _named(where: str, raw: Mapping[str, Any], key: str, kind: type) -> dict[str, str | None]:
    """The names given under `key`, with None for all that are not given."""
    given = raw[key]
    valid = [f.name for f in fields(kind)]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {key}: must be a mapping, not {given!r}.")
    if problems := [f"{where}: {registry.unknown(key, str(k), valid)}" for k in given if k not in valid]:
        raise ConfigError(problems)
    return {name: given.get(name) for name in valid}


def _columns(where: str, raw: Mapping[str, Any], formatting: str, location: str) -> Columns:
    if "columns" in raw:
        columns = Columns(**_named(where, raw, "columns", Columns))
    elif formatting == "text" or location.endswith(".txt"):
        columns = Columns(prompt="text", query=None, response=None)
    elif formatting == "openai":
        columns = Columns(messages="messages")
    else:
        columns = Columns()
    for modality in ("images", "videos", "audios"):
        if getattr(columns, modality) is not None:
            raise ConfigError(f"{where}: columns: {modality} are not supported. Only text can be trained.")
    return columns


def _tags(where: str, raw: Mapping[str, Any], formatting: str) -> Tags:
    if "tags" in raw:
        return Tags(**_named(where, raw, "tags", Tags))
    if formatting == "openai":
        return Tags("role", "content", "user", "assistant", "tool", "function_call", "system")
    return Tags()


def _placeholders(where: str, raw: Mapping[str, Any]) -> Mapping[str, str | None] | None:
    given = raw.get("placeholders")
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(v is None or isinstance(v, str) for v in given.values()):
        raise ConfigError(f"{where}: placeholders: must map words to texts or null, not {given!r}.")
    return dict(given)


def check_location(entry: DatasetEntry) -> None:
    """Refuse an entry whose file or folder is not there.

    Raises:
        DataError: names it.
    """
    if entry.source == "file" and not Path(entry.location).exists():
        message = f"there is no such file or folder. Correct file_name of data set {entry.name!r}."
        raise DataError(message, file=entry.location)
