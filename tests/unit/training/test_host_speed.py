"""How fast the host is found to be, on a machine whose other work comes and goes."""

from __future__ import annotations

import time
from itertools import accumulate, chain, repeat

import pytest
import torch

from fourfold.training.host_speed import host_op_seconds


def test_host_op_seconds_when_only_one_short_round_is_calm_is_of_that_round(monkeypatch: pytest.MonkeyPatch) -> None:
    between, disturbed, calm = 1.0, 7.4e-3, 6.2e-3
    rounds = chain([disturbed] * 7, [calm], repeat(disturbed))
    clock = accumulate(chain.from_iterable((between, seconds) for seconds in rounds))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert host_op_seconds.__wrapped__(torch.device("cpu")) == pytest.approx(6.2e-6)
