"""`fourfold data`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourfold.cli.session import Words, clear_errors, read_run

if TYPE_CHECKING:
    from fourfold.config.schema import Run


def data(words: Words = None) -> None:
    """Show what will be trained: token counts and the first example."""
    with clear_errors():
        print(describe(read_run(words, "data")))


def describe(run: Run) -> str:
    """Rows, tokens and lengths of a run's data, and its first example.

    Raises:
        FourfoldError: no such tokenizer or data set, or data that cannot be used.
    """
    from fourfold.dataset.stage_rows import check_named

    check_named(run)
    from fourfold.dataset.report import report
    from fourfold.models.renderer import load_renderer

    tokenizer, renderer = load_renderer(run)
    return report(run, tokenizer, renderer)
