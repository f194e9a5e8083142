"""Every random number of a run is a function of its seed and of where it is used, so no generator state is saved."""

from __future__ import annotations

import random

import numpy as np
import torch

_MASK = (1 << 63) - 1


def mix(*numbers: int) -> int:
    """One 63-bit seed from several integers (the finaliser of splitmix64, applied in turn)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
        state ^= state >> 31
    return state & _MASK


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, refuse kernels whose results vary."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def seed_micro_batch(seed: int, step: int, number: int) -> None:
    """Seed torch for one micro-batch of one step."""
    torch.manual_seed(mix(seed, step, number))
