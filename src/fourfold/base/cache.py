"""Where Fourfold keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder of all caches: `$FOURFOLD_CACHE`, or `~/.cache/fourfold`."""
    given = os.environ.get("FOURFOLD_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "fourfold"
