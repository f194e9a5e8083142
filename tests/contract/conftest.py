"""A tiny model and data set, made once for the whole tier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from command import Done, Refuse, Train, refusal, run_here, words_of
from tiny_models import save_tiny_model
from training_runs import config, write_dataset


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tokenised data of tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOURFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny llama with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small data sets."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of tokenised data of the test's own, so that the data is tokenised."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def words(tiny_llama: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command line that trains one step on the CPU, to be changed by what is added."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return words_of(config(tiny_llama, tiny_data, tmp_path / "out", max_steps=1))


@pytest.fixture
def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Train with some keys added, and return the line that refuses them."""

    def refuse(*added: str) -> str:
        return refusal(run_here(capsys, "train", *words, *added))

    return refuse


@pytest.fixture
def train(words: list[str], capsys: pytest.CaptureFixture[str]) -> Train:
    """Train with some keys added, which must go well."""

    def train(*added: str) -> Done:
        done = run_here(capsys, "train", *words, *added)
        assert done.code == 0, done.err
        assert done.out == ""
        assert "%|" not in done.err  # bars belong on a terminal
        return done

    return train


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of the run that `words` describe."""
    return tmp_path / "out"
