"""The function that an entry of `reward_funcs` names, found and checked before anything heavy is loaded.

An entry is `package.module:function`, `package.module.function`, `path/to/file.py:function` or the plain name of one of
`builtin.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.rewards import builtin
from fourfold.rewards.notices import shown_error

INPUTS = ("prompts", "completions", "references", "prompt_ids", "completion_ids", "finished")
"""What a reward function is given, each a list with one element per completion; it names those that it wants."""

_FORMS = "package.module:function, path/to/file.py:function or one of"


@dataclass(frozen=True, slots=True)
class Imported:
    """A reward function and what it is to be called with.

    Attributes:
        entry: as the config names it.
        name: of the function.
        function: takes the inputs as keywords.
        inputs: those of INPUTS that it takes.
    """

    entry: str
    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]


def import_function(entry: str) -> Imported:
    """Find a reward function.

    Raises:
        ConfigError: the file, module or function does not exist or cannot be imported, or is nothing that can be called
            with the inputs.
    """
    if ":" in entry:
        place, _, name = entry.rpartition(":")
        module = _from_file(entry, place) if place.endswith(".py") else _from_name(entry, place)
    elif "." in entry:
        place, _, name = entry.rpartition(".")
        module = _from_name(entry, place)
    else:
        place, name, module = "", entry, builtin
    functions = _functions(module)
    if (module is builtin and name not in functions) or name not in vars(module):
        raise ConfigError(_missing(entry, place, name, functions))
    function = vars(module)[name]
    if not callable(function) or isinstance(function, type) or inspect.iscoroutinefunction(function):
        kind = "async" if inspect.iscoroutinefunction(function) else f"a {type(function).__name__}"
        raise ConfigError(f"reward_funcs: {entry} is {kind}, not a plain function. Name a function.")
    return Imported(entry, name, function, _inputs(entry, function))


def _functions(module: ModuleType) -> list[str]:
    """The names of the functions that a module itself defines, but for private ones."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _missing(entry: str, place: str, name: str, functions: list[str]) -> str:
    close = registry.nearest(name, functions)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    listed = ", ".join(sorted(functions)) or "none"
    if not place:
        return f"reward_funcs: there is no reward {name!r}.{hint} Give {_FORMS}: {listed}."
    return f"reward_funcs: {place} has no {name!r} (entry {entry}).{hint} Its functions: {listed}."


def _from_name(entry: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(
            f"reward_funcs: {entry} does not name a function. Give package.module:function or path/to/file.py:function."
        )
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise ConfigError(
                f"reward_funcs: there is no module {missing} (entry {entry}). Modules of {Path.cwd()} and installed "
                "ones are found; check the name, or give path/to/file.py:function."
            ) from error
        raise _broken(entry, name, error) from error
    except Exception as error:
        raise _broken(entry, name, error) from error


def _from_file(entry: str, name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        near = registry.nearest(path.name, _python_files(path.parent), limit=1)
        hint = f" Did you mean {Path(name).with_name(near[0])}?" if near else ""
        raise ConfigError(f"reward_funcs: there is no file {path} (entry {entry}).{hint} Check the path.")
    registered = f"reward_file:{path}"
    if registered in sys.modules:
        return sys.modules[registered]
    _make_importable(path.parent)
    spec = importlib.util.spec_from_file_location(registered, path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[registered] = module  # before it runs: its dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[registered]
        raise _broken(entry, name, error) from error
    return module


def _python_files(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.py")] if folder.is_dir() else []


def _make_importable(folder: Path) -> None:
    """Let modules of a folder be imported, after all that can be imported already."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _broken(entry: str, place: str, error: Exception) -> ConfigError:
    where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
    return ConfigError(
        f"reward_funcs: {place} cannot be imported (entry {entry}){where}: {shown_error(error)}. Correct it."
    )


def _inputs(entry: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """Which inputs a function takes.

    Raises:
        ConfigError: it wants something else.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ConfigError(
            f"reward_funcs: {entry} does not tell its arguments. Wrap it in your own function."
        ) from error
    taken: list[str] = []
    for parameter in parameters:
        by_keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.kind is parameter.VAR_KEYWORD:
            return INPUTS
        if by_keyword and parameter.name in INPUTS:
            taken.append(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            raise ConfigError(_unknown_input(entry, parameter, by_keyword))
    return tuple(taken)


def _unknown_input(entry: str, parameter: inspect.Parameter, by_keyword: bool) -> str:
    if not by_keyword:
        return f"reward_funcs: {entry} takes {parameter.name!r} by position. Let it be given by keyword."
    close = registry.nearest(parameter.name, INPUTS, limit=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return (
        f"reward_funcs: {entry} asks for {parameter.name!r}, which there is not.{hint} A reward function may take the "
        f"lists {', '.join(INPUTS)}."
    )
