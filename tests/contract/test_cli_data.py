"""The verb `data`: what it shows, and what it need not load for that."""

from __future__ import annotations

from command import run_light


def test_data_when_shown_imports_no_model_code(words: list[str]) -> None:
    done = run_light("data", *words)
    assert done.code == 0, done.err
    assert done.out.startswith("Training data: 22 samples")
    imported = set(done.err.splitlines()[-1].removeprefix("imported: ").split(", "))
    assert {"torch", "transformers"} <= imported, "the list itself works"
    assert not imported & {"peft", "bitsandbytes"}
