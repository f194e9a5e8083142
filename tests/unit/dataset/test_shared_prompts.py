"""Both answers to a prompt see one copy of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, widen

APART = CutPolicy(packed=True, max_tokens=4096)
SHARED = replace(APART, shares_prompts=16)


def pair(prompt: int, chosen: int, rejected: int, index: int = 0) -> Sample:
    """A prompt of so many tokens and two answers, which are trained."""
    ids = [(7 * i + index) % 90 + 3 for i in range(prompt)]

    def answer(size: int, start: int) -> Example:
        own = [(start + 5 * i) % 90 + 3 for i in range(size)]
        return Example(ids + own, [IGNORE_INDEX] * prompt + own)

    return Sample({"chosen": answer(chosen, 1), "rejected": answer(rejected, 2)}, index)


def test_rows_when_prompts_are_shared_have_them_once() -> None:
    [apart], [shared] = cut([pair(20, 5, 7)], APART), cut([pair(20, 5, 7)], SHARED)
    assert apart.lengths == (25, 27)
    assert shared.lengths == (25, 8)  # the prompt's last token predicts the answer's first, so each has its own
    assert shared.position_ids[0, 25:].tolist() == list(range(19, 27))
    assert shared.keys is not None
    assert shared.keys.lengths == (25, 27)
    assert shared.keys.index.tolist() == [*range(25), *range(19), *range(25, 33)]
    assert shared.keys.offsets.tolist() == [0, 25, 52]
    assert shared.keys.places.tolist() == [[*range(25), *range(44, 52)], [*range(25, 44), *[-1] * 14]]
    for batch in (apart, shared):
        assert batch.num_targets == 12
        assert batch.samples == ((0, 0), (0, 1))
    trained = [batch.targets[batch.targets != IGNORE_INDEX].tolist() for batch in (apart, shared)]
    assert trained[0] == trained[1]
    seen = shared.input_ids[0].index_select(0, shared.keys.index).tolist()
    assert seen == apart.input_ids[0].tolist()


@pytest.mark.parametrize(
    "sample",
    [
        pair(10, 30, 30),  # too short to be worth it
        Sample({"": Example(list(range(3, 40)), list(range(3, 40)))}, 0),
        Sample({"chosen": Example([5] * 40, [5] * 40), "rejected": Example([5] * 40, [5] * 40)}, 0),  # all is trained
    ],
)
def test_rows_when_nothing_can_be_shared_are_as_they_were(sample: Sample) -> None:
    [batch] = cut([sample], SHARED)
    assert batch.keys is None
    assert torch.equal(batch.input_ids, cut([sample], APART)[0].input_ids)


def test_cut_when_prompts_are_shared_counts_them_once() -> None:
    samples = [pair(60, 5, 5, index) for index in range(4)]
    assert len(cut(samples, replace(APART, max_tokens=150))) == 4
    assert len(cut(samples, replace(SHARED, max_tokens=150))) == 2


def test_row_when_filled_up_has_keys_of_its_own_there() -> None:
    [batch] = cut([pair(20, 5, 7)], replace(SHARED, multiple=40))
    assert batch.keys is not None
    assert batch.lengths == (25, 8, 7)
    assert batch.keys.lengths == (25, 27, 7)
    assert batch.keys.index[-7:].tolist() == list(range(33, 40))
    assert batch.keys.index[batch.keys.places[0]].tolist() == list(range(40))
    assert batch.keys.places[1].tolist() == [*range(25, 44), *[-1] * 21]
    assert widen(batch, 40, SHARED) is batch
