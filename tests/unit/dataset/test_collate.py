"""Cutting a step into micro-batches loses nothing and keeps documents apart."""

from __future__ import annotations

import pytest
import torch

from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, equalize, widen


def _sample(index: int, length: int, documents: tuple[int, ...] = ()) -> Sample:
    ids = [100 * index + i for i in range(length)]
    return Sample({"": Example(ids, [IGNORE_INDEX, *ids[1:]], documents)}, index)


def test_cut_when_packed_lays_documents_end_to_end() -> None:
    [batch] = cut([_sample(1, 3), _sample(2, 5, (2, 3))], CutPolicy(packed=True, max_tokens=100))
    assert batch.input_ids.tolist() == [[100, 101, 102, 200, 201, 202, 203, 204]]
    # a target is the next token of the same document; the first label of the second document is no target
    assert batch.targets.tolist() == [[101, 102, -100, 201, -100, 203, 204, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.samples == ((1, 0), (2, 0), (2, 0))
    assert (batch.num_tokens, batch.num_targets, batch.max_seqlen) == (8, 5, 3)


def test_cut_when_padded_fills_on_the_right() -> None:
    [batch] = cut([_sample(1, 3), _sample(2, 5)], CutPolicy(packed=False, max_tokens=100, pad_token_id=9))
    assert batch.input_ids.tolist() == [[100, 101, 102, 9, 9], [200, 201, 202, 203, 204]]
    assert batch.targets.tolist() == [[101, 102, -100, -100, -100], [201, 202, 203, 204, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert batch.document_ids.tolist() == [[0, 0, 0, -1, -1], [1, 1, 1, 1, 1]]
    assert batch.cu_seqlens is None
    assert batch.num_tokens == 8


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 10, 23, 1000])
def test_cut_when_limited_keeps_every_sample_once_within_the_limit(packed: bool, max_tokens: int) -> None:
    samples = [_sample(i, length) for i, length in enumerate((5, 9, 2, 14, 7, 7, 3))]
    batches = cut(samples, CutPolicy(packed=packed, max_tokens=max_tokens))
    assert sorted(sample for batch in batches for sample, _ in batch.samples) == list(range(7))
    for batch in batches:
        assert batch.input_ids.numel() <= max_tokens or len(batch.samples) == 1
    assert sum(batch.num_targets for batch in batches) == 5 + 9 + 2 + 14 + 7 + 7 + 3 - 7


def test_cut_when_weights_are_given_carries_them_to_the_targets() -> None:
    example = Example([1, 2, 3], [IGNORE_INDEX, 2, 3], weights=[0.0, 0.5, 2.0])
    [batch] = cut([Sample({"": example}, 0)], CutPolicy(packed=True, max_tokens=10))
    torch.testing.assert_close(batch.weights, torch.tensor([[0.5, 2.0, 0.0]]))


def test_cut_when_a_group_has_several_sequences_never_splits_it() -> None:
    pair = Sample({"chosen": Example([1] * 6, [1] * 6), "rejected": Example([2] * 6, [2] * 6)}, 3)
    [batch] = cut([pair], CutPolicy(packed=True, max_tokens=8))
    assert batch.samples == ((3, 0), (3, 1))


@pytest.mark.parametrize("packed", [True, False])
def test_cut_when_several_are_needed_makes_them_even(packed: bool) -> None:
    samples = [_sample(i, 10) for i in range(9)]
    batches = cut(samples, CutPolicy(packed=packed, max_tokens=45))
    assert [len(batch.samples) for batch in batches] == [3, 3, 3]


@pytest.mark.parametrize("packed", [True, False])
def test_cut_when_rows_are_shared_makes_their_length_a_multiple(packed: bool) -> None:
    plain, widened = (cut([_sample(0, 5), _sample(1, 4)], CutPolicy(packed, 100, multiple=m))[0] for m in (1, 8))
    width = plain.input_ids.shape[1]
    assert widened.input_ids.shape[1] == (16 if packed else 8)
    assert torch.equal(widened.input_ids[:, :width], plain.input_ids)
    assert (widened.targets[:, width:] == IGNORE_INDEX).all()
    assert widened.num_tokens == plain.num_tokens == 9
    assert widened.num_targets == plain.num_targets
    if packed:
        assert widened.lengths == (*plain.lengths, 7)
        assert widened.cu_seqlens is not None
        assert int(widened.cu_seqlens[-1]) == 16
        assert len(widened.samples) == len(widened.lengths)


@pytest.mark.parametrize("packed", [True, False])
def test_real_positions_when_widened_twice_leave_out_all_that_was_added(packed: bool) -> None:
    policy = CutPolicy(packed=packed, max_tokens=100, multiple=8)
    [batch] = cut([_sample(0, 5), _sample(1, 4)], policy)
    wider = widen(batch, batch.input_ids.shape[1] + 8, policy)
    assert wider.real_positions().sum(1).tolist() == ([9] if packed else [5, 4])
    # two fillers of a packed row are two documents, and the padding of a padded row is one
    assert wider.documents_of_rows() == (((5, 4, 7, 8),) if packed else ((5, 11), (4, 12)))


def test_cut_when_more_batches_are_wanted_spreads_the_samples() -> None:
    samples = [_sample(i, 10) for i in range(6)]
    batches = cut(samples, CutPolicy(packed=True, max_tokens=100, min_batches=3))
    assert [len(batch.samples) for batch in batches] == [2, 2, 2]
    assert len(cut(samples[:2], CutPolicy(packed=True, max_tokens=100, min_batches=3))) == 2


@pytest.mark.parametrize("packed", [True, False])
def test_equalize_when_shapes_differ_adds_what_counts_for_nothing(packed: bool) -> None:
    policy = CutPolicy(packed=packed, max_tokens=24, multiple=4)
    batches = cut([_sample(0, 15), _sample(1, 3), _sample(2, 5), _sample(3, 2)], policy)
    assert len({batch.input_ids.shape for batch in batches}) > 1
    equal = equalize(batches)
    assert len({batch.input_ids.shape for batch in equal}) == 1
    for before, after in zip(batches, equal, strict=True):
        assert after.num_targets == before.num_targets
        assert after.num_tokens == before.num_tokens == int(after.real_positions().sum())
        assert float(after.weights.sum()) == float(before.weights.sum())
        if packed:
            assert after.cu_seqlens is not None
            assert after.cu_seqlens.diff().tolist() == list(after.lengths)
