"""Fixtures shared by all tiers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked children hang where a parent has had threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of the real 135M model; the Makefile fetches it."""
    if not SMOLLM2.exists():
        pytest.skip("the SmolLM2 model is not there; `make model` fetches it")
    return SMOLLM2
