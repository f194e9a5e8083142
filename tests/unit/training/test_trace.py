"""Memory counted operator by operator, on real tensors and on fake ones."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fourfold.training.trace import MemoryTrace

_MIB = 1 << 20


@pytest.mark.parametrize("fake", [False, True])
def test_trace_counts_storages_once_and_forgets_them(fake: bool) -> None:
    with FakeTensorMode() if fake else nullcontext(), MemoryTrace() as trace:
        with trace.phase("a"):
            x = torch.zeros(1024, 1024)
            view = x.view(-1)[:10]
        assert trace.total == trace.held("a") == 4 * _MIB
        with trace.phase("b"):
            y = x + 1
            del y
        del x
        assert trace.total == 4 * _MIB  # the view holds it
        del view
        assert trace.total == 0
        assert trace.peak.total == 8 * _MIB
        assert trace.peak.by_phase == {"a": 4 * _MIB, "b": 4 * _MIB}
        assert trace.peak.phase == "b"


def test_trace_rounds_as_the_allocator_does() -> None:
    with MemoryTrace() as trace:
        held = [torch.zeros(1), torch.zeros(129)]
        assert trace.total == 512 + 1024
        del held


def test_trace_when_a_storage_is_resized_follows_it() -> None:
    with MemoryTrace() as trace:
        x = torch.zeros(_MIB // 4)
        x.untyped_storage().resize_(0)
        assert trace.total == 0
        x.untyped_storage().resize_(2 * _MIB)
        assert trace.total == 2 * _MIB


def test_trace_counts_what_autograd_keeps() -> None:
    x = torch.ones(256, 1024, requires_grad=True)  # from before, so not counted
    with MemoryTrace() as trace:
        y = x.exp()  # keeps its result
        z = (y * 2).sum()  # of the product nothing is needed
        assert trace.total == _MIB + 512
        z.backward()
        assert x.grad is not None
        trace.hold([x.grad], "gradients")
        assert trace.held("gradients") == _MIB
        del y, z
    assert trace.peak.total >= 2 * _MIB
