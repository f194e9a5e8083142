"""How fast this machine's host drives its GPU: what a step takes where the GPU waits for it (planning/kernels.py)."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache

import torch

from fourfold.planning.hardware import Cluster

_OPERATORS, _ROUNDS = 1000, 12
"""Short rounds, and many: what disturbs a host lasts longer than one, and passes."""


@lru_cache(maxsize=8)
def host_op_seconds(device: torch.device) -> float:
    """Time of one small operator in eager mode, seconds: the best of a dozen rounds, 40 to 150 ms in all."""
    number = torch.ones(8, device=device)
    best = float("inf")
    for _ in range(_ROUNDS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(_OPERATORS):
            number.add_(1)
        best = min(best, (time.perf_counter() - started) / _OPERATORS)
    torch.cuda.synchronize(device)
    return best


def with_this_host(cluster: Cluster, device: torch.device) -> Cluster:
    """The cluster with this host's speed for all its nodes'; as it is where there is no GPU to drive."""
    if device.type != "cuda":
        return cluster
    return replace(cluster, device=replace(cluster.device, host_op_s=host_op_seconds(device)))
