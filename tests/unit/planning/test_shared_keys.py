"""What attention over positions that ranks share keeps, by the kernels that a card has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest

from fourfold.planning.activations import kept
from fourfold.planning.hardware import find_device
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.shape import ModelShape

_JOB = Job(sequence=65_536, sequences_per_step=1)


@pytest.fixture
def llama(shape_of: Callable[[str], ModelShape]) -> ModelShape:
    return shape_of("Llama-3-8B")


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        # keys and values of four ranks, 1,024 each; before 4.5 chunks of each for all 32 heads, and the result twice
        ("allgather", 4.5 * 8192 + 4096 - 4 * 2048),
        ("ulysses", 8192 - 2048),
        ("ring", 8192 - 2048),
    ],
)
def test_layer_when_each_key_is_kept_once_keeps_less(
    llama: ModelShape, method: Literal["allgather", "ulysses", "ring"], numbers: float
) -> None:
    layout = Layout(cp=4, cp_method=method)
    repeated, once = (kept(llama, replace(_JOB, keys_once=each), layout, 0, trained=False) for each in (False, True))
    assert repeated.none - once.none == 2 * numbers
    assert once.selective == repeated.selective


def test_memory_when_a_card_lacks_the_kernels_has_keys_repeated(llama: ModelShape) -> None:
    layout = Layout(cp=4, cp_shards=True)
    old, new = (
        estimate_memory(llama, _JOB, layout, "full", 65_536, device=find_device(name)).terms["activations"]
        for name in ("a100", "h100")
    )
    assert old - new == 2 * (4.5 * 8192 + 4096 - 4 * 2048) * 65_536 / 4
