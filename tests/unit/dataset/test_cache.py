"""The cache: written whole or not at all, once, and told apart by content."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from byte_tokenizer import make_byte_tokenizer
from fourfold.base.errors import DataError
from fourfold.dataset.cache import fingerprint_of, load_or_write, tokenizer_digest


def write_file(folder: Path) -> None:
    (folder / "data").write_text("whole")


def test_load_or_write_when_called_twice_writes_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    for _ in range(2):
        load_or_write(tmp_path / "a", lambda folder: (calls.append(folder), write_file(folder))[1])
    assert len(calls) == 1
    assert (tmp_path / "a" / "data").read_text() == "whole"


def test_load_or_write_when_writing_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_file(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_write(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_load_or_write_when_overwriting_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    load_or_write(tmp_path / "a", write_file, overwrite=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["data"]


def test_load_or_write_when_disk_is_full_says_what_to_do(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"No space left on device.*Free space"):
        load_or_write(tmp_path / "a", fail)


def test_load_or_write_when_two_write_at_once_lets_the_second_wait(tmp_path: Path) -> None:
    calls: list[str] = []

    def write(folder: Path) -> None:
        calls.append("begin")
        time.sleep(0.2)
        write_file(folder)
        calls.append("end")

    threads = [threading.Thread(target=load_or_write, args=(tmp_path / "a", write)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["begin", "end"]


def test_tokenizer_digest_when_saved_and_loaded_stays_the_same(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer("<|im_end|>")
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(tokenizer)


def test_tokenizer_digest_when_anything_that_matters_differs_differs_too() -> None:
    first = tokenizer_digest(make_byte_tokenizer())
    assert tokenizer_digest(make_byte_tokenizer()) == first
    assert tokenizer_digest(make_byte_tokenizer("<|im_end|>")) != first
    other = make_byte_tokenizer()
    other.pad_token = other.eos_token
    before = tokenizer_digest(other)
    other("some text", padding="max_length", max_length=8, truncation=True)
    assert tokenizer_digest(other) == before
    other = make_byte_tokenizer()
    other.split_special_tokens = True
    assert tokenizer_digest(other) != first


def test_fingerprint_of_when_facts_differ_differs() -> None:
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})
