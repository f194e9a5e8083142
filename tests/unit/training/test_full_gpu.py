"""A GPU that other processes fill is told as such."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourfold.base.errors import MemoryExhaustedError
from fourfold.base.units import GIB
from fourfold.config.load import load
from fourfold.parallel.mesh import start_process_group
from fourfold.planning.layout import Layout
from fourfold.training import exhaustion
from fourfold.training.exhaustion import Place, exhaustion_told

_GPU = torch.device("cuda", 1)


def test_start_when_a_gpu_is_full_says_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    with pytest.raises(MemoryExhaustedError, match=r"cuda:1 has no memory left .* other processes"):
        start_process_group(_GPU, 10)


def test_start_when_a_gpu_fails_otherwise_raises_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        start_process_group(_GPU, 10)


@pytest.mark.parametrize(("free", "told"), [(10 * GIB, True), (49 * GIB, False)])
def test_advice_when_other_processes_hold_memory_begins_with_them(
    free: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30 * GIB)
    monkeypatch.setattr(exhaustion, "peak_memory_figures", lambda: {"peak_memory_gib": 30, "reserved_memory_gib": 30})
    mesh: Any = SimpleNamespace(device=_GPU, rank=0, layout=Layout())
    run = load({"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}, verb="train")
    with (
        pytest.raises(MemoryExhaustedError) as found,
        exhaustion_told(run, mesh, lambda: Place("while the model was loaded")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    first = str(found.value).splitlines()[1]
    assert ("39.00 GiB of cuda:1 are held by other processes" in first) == told
