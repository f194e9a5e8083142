"""`fourfold version`."""

from __future__ import annotations

from fourfold.version import __version__


def version() -> None:
    """Print the version."""
    print(f"fourfold {__version__}")
