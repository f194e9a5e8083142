"""What a run took of its device's memory."""

from __future__ import annotations

import resource
import sys

import torch

from fourfold.base.units import GIB


def peak_memory_figures() -> dict[str, float]:
    """Peak memory so far, in GiB: the allocator's on CUDA, the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return {
            "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_memory_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
