"""`fourfold export`."""

from __future__ import annotations

from fourfold.cli.session import Words, clear_errors, read_run


def export(words: Words = None) -> None:
    """Merge an adapter into its model and write the result."""
    with clear_errors():
        run = read_run(words, "export")
        from fourfold.checkpoint import export as checkpoint

        checkpoint.export(run)
