"""What Inductor is told changes no value."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from fourfold.base.inductor import beside, teach_inductor, written_once


@pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_values_when_compiled_are_what_they_are_without() -> None:
    teach_inductor()

    def computed(x: Tensor) -> tuple[Tensor, Tensor]:
        values = written_once(torch.nn.functional.silu(x) * x)
        flat = values.view(-1, x.shape[-1])
        return beside([flat + 1, flat.cos()]), values.abs().amax(-1)

    torch._dynamo.reset()
    compiled = torch.compile(computed, dynamic=True, fullgraph=True)
    for rows in (8, 24):
        x = torch.randn(2, rows, 32, generator=torch.Generator().manual_seed(rows))
        for found, expected in zip(compiled(x), computed(x), strict=True):
            torch.testing.assert_close(found, expected)


def test_values_when_nothing_is_compiled_are_not_copied() -> None:
    x = torch.ones(2, 3)
    assert written_once(x) is x
    assert torch.ops.fourfold.written_once(x) is not x
