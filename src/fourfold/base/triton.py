"""Whether Triton is there, which PyTorch brings along on CUDA."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether kernels in Triton can be imported; looked up once."""
    return find_spec("triton") is not None
