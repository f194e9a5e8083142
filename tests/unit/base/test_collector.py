"""What lasts is left out of later searches for cycles; what comes after is found."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from fourfold.base.collector import lasting


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


class _Ring:
    def __init__(self) -> None:
        self.me = self


def test_cycles_when_made_within_stay_and_when_made_later_are_found() -> None:
    before = gc.get_freeze_count()
    with lasting():
        assert not gc.isenabled()
        lasts = weakref.ref(_Ring())
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    goes = weakref.ref(_Ring())
    gc.collect()
    assert lasts() is not None
    assert goes() is None


def test_searches_when_off_before_are_off_after() -> None:
    gc.disable()
    try:
        with lasting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
