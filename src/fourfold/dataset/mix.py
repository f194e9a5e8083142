"""Which rows of which data sets are used, in which order: pure functions of sizes, strategy and seed.

The orders equal those of `datasets.interleave_datasets` and `Dataset.train_test_split` for the same seed, so that a
config brought from elsewhere sees the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

MixStrategy = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]

_DRAWS = 1000


def mix_order(sizes: Sequence[int], strategy: MixStrategy, probabilities: Sequence[float], seed: int) -> np.ndarray:
    """The order in which rows of several data sets are used.

    Args:
        sizes: rows of each data set, none of them 0.
        strategy: `concat`: one set after the other; else the sets take turns (or are drawn with `probabilities`) until
            the first is used up (`interleave_under`), the last is used up and the others start again
            (`interleave_over`), or all are used up and each row is used once (`interleave_once`).
        probabilities: of each set; empty to take turns.
    Returns:
        int64 [rows, 2]: number of the data set and row within it.
    """
    if strategy == "concat" or len(sizes) == 1:
        return np.concatenate([_rows_of(number, np.arange(size)) for number, size in enumerate(sizes)])
    if probabilities:
        return _drawn(np.asarray(sizes), strategy, np.asarray(probabilities) / sum(probabilities), seed)
    return _in_turns(np.asarray(sizes), strategy)


def _rows_of(number: int, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(rows), number, dtype=np.int64), rows.astype(np.int64)], axis=1)


def _in_turns(sizes: np.ndarray, strategy: MixStrategy) -> np.ndarray:
    rounds = sizes.min() if strategy == "interleave_under" else sizes.max()
    rows = np.repeat(np.arange(rounds), len(sizes))
    numbers = np.tile(np.arange(len(sizes)), rounds)
    if strategy == "interleave_once":
        left = rows < sizes[numbers]
        rows, numbers = rows[left], numbers[left]
    return np.stack([numbers, rows % sizes[numbers]], axis=1)


def _drawn(sizes: np.ndarray, strategy: MixStrategy, probabilities: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawable = probabilities > 0
    blocks: list[np.ndarray] = []
    counts = np.zeros(len(sizes), dtype=np.int64)
    enough = np.any if strategy == "interleave_under" else np.all
    while not enough(counts[drawable] >= sizes[drawable]):
        blocks.append(rng.choice(len(sizes), size=_DRAWS, p=probabilities))
        counts += np.bincount(blocks[-1], minlength=len(sizes))
    numbers = np.concatenate(blocks)
    rows = np.empty_like(numbers)
    used_up: list[int] = []
    for number, size in enumerate(sizes):
        places = np.flatnonzero(numbers == number)
        rows[places] = np.arange(len(places))
        if drawable[number] and len(places) >= size:
            used_up.append(int(places[size - 1]))
    last = min(used_up) if strategy == "interleave_under" else max(used_up)
    order = np.stack([numbers, rows], axis=1)[: last + 1]
    if strategy == "interleave_once":
        return order[order[:, 1] < sizes[order[:, 0]]]
    order[:, 1] %= sizes[order[:, 0]]
    return order


def split_rows(num_rows: int, val_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out rows.

    Args:
        val_size: below 1 the share of rows to hold out (rounded up), else their number.
    Returns:
        two int64 arrays of row numbers without a common one; together all rows, in random order.
    """
    num_held_out = math.ceil(val_size * num_rows) if val_size < 1 else int(val_size)
    order = np.random.default_rng(seed).permutation(num_rows)
    return order[num_held_out:], order[:num_held_out]


def sample_rows(num_rows: int, num_samples: int, seed: int) -> np.ndarray:
    """`num_samples` random rows: each at most once while there are enough, then some again; int64 [num_samples]."""
    rng = np.random.default_rng(seed)
    first = rng.permutation(num_rows)[:num_samples]
    return np.concatenate([first, rng.choice(num_rows, num_samples - len(first))])


def stream_numbers(num_sets: int, probabilities: Sequence[float], seed: int) -> Iterator[int]:
    """Without end: which data set gives the next row, in turns or drawn with `probabilities`."""
    rng = np.random.default_rng(seed)
    chances = np.asarray(probabilities) / sum(probabilities) if probabilities else None
    while True:
        block = range(num_sets) if chances is None else rng.choice(num_sets, size=_DRAWS, p=chances)
        yield from (int(number) for number in block)
