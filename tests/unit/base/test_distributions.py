"""What is installed is looked up once, until something is installed or removed."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from fourfold.base.distributions import distributions_kept


def _asked(file: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    def look_up() -> dict[str, list[str]]:
        calls.append(1)
        return {"yaml": ["PyYAML"]}

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "packages_distributions", look_up)
        with distributions_kept(file):
            return dict(importlib.metadata.packages_distributions())


def test_distributions_when_nothing_has_changed_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    found = [_asked(tmp_path / "new" / "kept.json", calls, monkeypatch) for _ in range(3)]
    assert found == [{"yaml": ["PyYAML"]}] * 3
    assert len(calls) == 1


def test_distributions_when_a_package_is_installed_are_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, calls = tmp_path / "packages", list[int]()
    packages.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    for _ in range(2):
        _asked(tmp_path / "kept.json", calls, monkeypatch)
    (packages / "torch_extra-1.0.dist-info").mkdir()
    _asked(tmp_path / "kept.json", calls, monkeypatch)
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_distributions_when_the_file_is_broken_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file, calls = tmp_path / "kept.json", list[int]()
    file.write_text(text)
    for _ in range(2):
        assert _asked(file, calls, monkeypatch) == {"yaml": ["PyYAML"]}
    assert len(calls) == 1


def test_distributions_when_the_file_cannot_be_written_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    calls: list[int] = []
    for _ in range(2):
        _asked(tmp_path / "file" / "kept.json", calls, monkeypatch)
    assert len(calls) == 2
