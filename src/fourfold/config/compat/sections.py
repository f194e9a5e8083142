"""The keys of other tools, as sections that no run holds: their values are mapped to ours, or refused."""

from __future__ import annotations

from fourfold.config.key import Section

COMPAT: tuple[type[Section], ...] = ()
