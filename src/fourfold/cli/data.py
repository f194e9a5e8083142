"""`fourfold data`."""

from __future__ import annotations

from fourfold.cli.session import Words, clear_errors, read_run


def data(words: Words = None) -> None:
    """Show what will be trained: token counts and the first example."""
    with clear_errors():
        run = read_run(words, "data")
        from fourfold.dataset.report import report

        print(report(run))
