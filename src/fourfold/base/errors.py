"""The errors a user may see; every one is a clear line and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class FourfoldError(Exception):
    """Base of all errors that are the user's to settle; the command line prints them without a traceback."""

    exit_code = 2


class ConfigError(FourfoldError):
    """One or more problems of a config, all found before anything heavy is imported.

    Args:
        problems: one line each, in the form `<key>: <what is wrong, with both values>. <what to do>.`
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class PlanError(FourfoldError):
    """The requested layout cannot work for this model on these devices."""


class DataError(FourfoldError):
    """A data set, file or row is not usable.

    Args:
        message: what is wrong and what to do.
        file: the file it was found in, if known.
        row: row within the file, if known, from 0; people are told it from 1, as lines are.
    """

    def __init__(self, message: str, *, file: str | None = None, row: int | None = None) -> None:
        self.file, self.row = file, row
        where = "" if file is None else f"{file}: " if row is None else f"{file}, row {row + 1}: "
        super().__init__(where + message)


class ModelError(FourfoldError):
    """A model, tokenizer or adapter cannot be used as asked."""


class MemoryExhaustedError(FourfoldError):
    """A device has too little memory for what was asked; tells where it ran out and what to change, best first."""


class CheckpointError(FourfoldError):
    """A checkpoint is missing, damaged or does not belong to this run."""


class RunInterruptedError(FourfoldError):
    """The user or the system asked the run to stop; it saved and leaves."""

    def __init__(self, message: str, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
