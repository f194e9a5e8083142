"""Python's search for cycles of objects, held back where it can find nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """Within it nothing is searched, and what was made is left out of every later search.

    For imports: what a module makes stays. Hundreds of thousands of objects come with PyTorch and Transformers, and
    each search goes through all of them: a sixth of the time of importing them, and part of every first compilation.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
