"""`fourfold chat`."""

from __future__ import annotations

from fourfold.cli.session import Words, clear_errors, read_run


def chat(words: Words = None) -> None:
    """Talk to a model, with its adapter if one is given."""
    with clear_errors():
        run = read_run(words, "chat")
        from fourfold.serve import chat as serve

        serve.chat(run)
