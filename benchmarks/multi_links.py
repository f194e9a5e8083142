"""What ranks send each other, timed: collectives over all ranks and sends between two, for sizes up to a gibibyte.

Rates are those of a link, so that they can be held against each other and against the catalogue's: bytes that one rank
sends in one direction, each second. Of n ranks and a whole of S bytes that is (n - 1)/n S for all_gather,
reduce_scatter and all_to_all, and twice that for all_reduce, as a ring sends it. The catalogue's `link_gb_s` is the
best of all_gather and reduce_scatter, its latency what a small all_gather takes over its n - 1 hops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from fourfold.planning.device import LINK_SHARE

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
SIZES = tuple(4**power for power in range(5, 16))
"""Bytes of the whole: 1 KiB to 1 GiB."""
TINY_SIZES = (1 << 10, 1 << 14, 1 << 18)
_SMALL = 1 << 14
"""Bytes up to which a collective's time is its latency."""
_ROUNDS = 5


def run_case(device: torch.device, *, is_tiny: bool) -> dict[str, Any]:
    """Time all operations; every rank of the job must call.

    Returns:
        `rates`: of each operation rows [bytes, seconds, GB/s]; `link_gb_s` and `latency_us` for the catalogue.
    """
    ranks = dist.get_world_size()
    rates: dict[str, list[list[float]]] = {}
    for operation in OPERATIONS:
        rates[operation] = []
        for size in TINY_SIZES if is_tiny else SIZES:
            seconds = _time(operation, size, ranks, device)
            rates[operation].append([size, seconds, 1e-9 * sent_bytes(operation, size, ranks) / seconds])
    return {"ranks": ranks, "rates": rates, **catalogue_figures(rates, ranks)}


def sent_bytes(operation: str, size: int, ranks: int) -> float:
    """What one rank sends in one direction, of a whole of `size` bytes."""
    if operation == "send_recv":
        return size
    share = size * (ranks - 1) / ranks
    return 2 * share if operation == "all_reduce" else share


def catalogue_figures(rates: dict[str, list[list[float]]], ranks: int) -> dict[str, float]:
    """The figures that the planner's catalogue has of a link."""
    best = max(row[2] for name in ("all_gather", "reduce_scatter") for row in rates[name])
    small = min(row[1] for row in rates["all_gather"] if row[0] <= _SMALL)
    return {"link_gb_s": best, "latency_us": 1e6 * small / (ranks - 1)}


def table(row: dict[str, Any]) -> str:
    """Lines with the GB/s of each operation by size, for people."""
    rates = row["rates"]
    lines = ["GB/s of a rank" + "".join(f"{name:>16}" for name in rates)]
    for number, (size, _, _) in enumerate(next(iter(rates.values()))):
        lines.append(f"{size:>14,}" + "".join(f"{rates[name][number][2]:>16.4g}" for name in rates))
    return "\n".join(lines)


def hardware_file(row: dict[str, Any], gpu: str | None, host_op_us: float | None) -> str:
    """A file for `fourfold plan --hardware` of what was measured."""
    lines = [
        f"gpu: {gpu or 'h100  # a stand-in, measured without a GPU'}",
        f"gpus: {row['ranks']}",
        f"link_gb_s: {row['link_gb_s'] / LINK_SHARE:.4g}  # {row['link_gb_s']:.4g} arrive, of which a file says more",
        f"# of a small collective, for each rank but one: {row['latency_us']:.1f} us, which is mostly the host's call",
    ]
    if host_op_us is not None:
        lines.append(f"host_op_us: {host_op_us:.1f}")
    return "\n".join(lines) + "\n"


def _time(operation: str, size: int, ranks: int, device: torch.device) -> float:
    """Seconds of one call, the median of a few; small ones are called many times in a row."""
    call, calls = _call(operation, size, ranks, device), 20 if size <= 1 << 20 else 3
    call()
    seconds = []
    for _ in range(_ROUNDS):
        _wait(device)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        seconds.append((time.perf_counter() - started) / calls)
    return median(seconds)


def _call(operation: str, size: int, ranks: int, device: torch.device) -> Callable[[], Any]:
    numbers = max(size // 2, ranks) // ranks * ranks  # of bf16
    whole = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    part = torch.ones(numbers // ranks, dtype=torch.bfloat16, device=device)
    if operation == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if operation == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    if operation == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    if operation == "all_to_all":
        other = torch.empty_like(whole)
        return lambda: dist.all_to_all_single(other, whole)
    rank, received = dist.get_rank(), torch.empty_like(whole)

    def pass_on() -> None:
        """To the next rank, from the one before, at the same time."""
        sends = [
            dist.P2POp(dist.isend, whole, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(sends):
            work.wait()

    return pass_on


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
