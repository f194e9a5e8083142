"""Packing: several samples in one sequence, each still a document of its own."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill packs greedily: each takes the longest sample that still fits, until none does.

    Args:
        lengths: of the samples; none longer than `capacity`.
        capacity: longest pack.
    Returns:
        the numbers of the samples of each pack.
    """
    waiting = sorted(lengths)
    numbers: defaultdict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        numbers[length].append(number)
    packs: list[list[int]] = []
    while waiting:
        pack: list[int] = []
        room = capacity
        while (fitting := bisect.bisect(waiting, room)) > 0:
            length = waiting.pop(fitting - 1)
            pack.append(numbers[length].pop())
            room -= length
        packs.append(pack)
    return packs
