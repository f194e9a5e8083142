"""`fourfold help`."""

from __future__ import annotations

from typing import Annotated

import typer

from fourfold.cli.session import clear_errors


def explain(
    names: Annotated[list[str] | None, typer.Argument(metavar="[KEY | GROUP]...", show_default=False)] = None,
) -> None:
    """List the config keys, or explain some of them."""
    with clear_errors():
        from fourfold.config.render import key_help, overview

        print("\n\n".join(key_help(name) for name in names) if names else overview())
