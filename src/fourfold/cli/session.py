"""What every verb of the command line does: read its words into a run, and turn errors into clear lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.base.errors import ConfigError, FourfoldError
from fourfold.base.hub import settle_hub
from fourfold.base.log import get_logger

if TYPE_CHECKING:  # the config's models take longer to import than `fourfold --help` may take in all
    from fourfold.config.rules import Verb
    from fourfold.config.schema import Run

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE | KEY=VALUE",
        show_default=False,
        help="A YAML or JSON file, then keys that win over it: key=value or --key value, nested parallel.tp=2.",
    ),
]
"""The arguments of a verb that takes a config."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it."""


def read_run(words: Sequence[str] | None, verb: Verb) -> Run:
    """The run that a command line describes, checked for `verb`; logging is set up.

    Raises:
        ConfigError: with every problem.
    """
    if not words:
        raise ConfigError(f"{verb}: needs a config. Write `fourfold {verb} FILE.yaml`, or give keys as key=value.")
    from fourfold.config.begin import begin
    from fourfold.config.paths import names_hub

    has_file = not words[0].startswith("--") and "=" not in words[0]
    run = begin(words[0] if has_file else None, words[1:] if has_file else words, verb)
    if names_hub(run):
        settle_hub()
    return run


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print a user's error as plain lines and leave with its code; Ctrl-C is one line too.

    Raises:
        typer.Exit: in place of a FourfoldError, a KeyboardInterrupt or a closed output.
    """
    try:
        yield
    except FourfoldError as error:
        get_logger(__name__).debug("Where it comes from:", exc_info=error)
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # the reader (say, `head`) has gone; keep the interpreter from writing what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
