"""Settings that must be made before TRL is imported."""

from __future__ import annotations

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its warning of unstable interfaces would be an error
