"""The verb `data`: what it shows, and what it need not load for that; and data that need no chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import Refuse, Train, run_apart, run_here, run_light
from tiny_models import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def no_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key that names a model whose tokenizer has no chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return f"model_name_or_path={save_tiny_model(tmp_path_factory.mktemp('models') / 'base', tokenizer=tokenizer)}"


def test_data_when_shown_imports_no_model_code(words: list[str]) -> None:
    done = run_light("data", *words)
    assert done.code == 0, done.err
    assert done.out.startswith("Training data: 22 samples")
    imported = set(done.err.splitlines()[-1].removeprefix("imported: ").split(", "))
    assert {"torch", "transformers"} <= imported, "the list itself works"
    assert not imported & {"peft", "bitsandbytes"}


def test_plain_text_when_the_tokenizer_has_no_chat_template_is_shown_and_trained(
    words: list[str], train: Train, no_template: str, capsys: pytest.CaptureFixture[str], out: Path
) -> None:
    text = ("stage=pt", "dataset=tiny_text", "cutoff_len=32", no_template)
    shown = run_here(capsys, "data", *words, *text)
    assert shown.code == 0, shown.err
    assert "Training data:" in shown.out
    done = train(*text)
    assert f"template=empty adapter_name_or_path={out}" in done.err.splitlines()[-1]


def test_chats_when_the_tokenizer_has_no_chat_template_are_refused(refuse: Refuse, no_template: str) -> None:
    assert "template: 'auto' takes the tokenizer's own chat template" in refuse(no_template)


def test_hub_when_it_cannot_be_reached_is_asked_once_and_the_ways_out_are_named(words: list[str]) -> None:
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    done = run_apart("data", *words, "model_name_or_path=owner/model", **nowhere)
    assert done.code == 2
    first, last = done.err.splitlines()
    assert first.startswith("warning: http://127.0.0.1:9 cannot be reached (Connection refused)")
    assert last.startswith("model_name_or_path: the tokenizer of owner/model is not in the cache")
    assert all(way in last for way in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "local path"))
