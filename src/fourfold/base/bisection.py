"""The largest number that fits, where all smaller ones do."""

from __future__ import annotations

from collections.abc import Callable


def largest_that(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` that fits; 0 is not asked about."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
