"""One folder holds every cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.base.cache import cache_root


def test_cache_root_when_set_in_the_environment_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("FOURFOLD_CACHE")
    assert cache_root() == Path.home() / ".cache" / "fourfold"
