"""What is rounded up to be recorded gives the sums of what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fourfold.dataset.batch import IGNORE_INDEX, Batch, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.losses.token import TokenLoss
from fourfold.models.equal_documents import EqualDocuments
from fourfold.models.noise import NoiseKeys
from fourfold.parallel.graphs import rounded
from fourfold.parallel.loss import Outputs

_VOCABULARY, _HIDDEN = 50, 8


def batch_of(*lengths: int) -> Batch:
    samples = []
    for index, length in enumerate(lengths):
        ids = [(index + 3 * i) % _VOCABULARY for i in range(length)]
        labels = [IGNORE_INDEX if i < length // 3 else token for i, token in enumerate(ids)]
        samples.append(Sample({"": Example(ids, labels)}, index))
    [batch] = cut(samples, CutPolicy(packed=True, max_tokens=4096))
    return batch


@pytest.mark.parametrize("lengths", [(5,), (30, 98), (128,), (700, 9, 320), (1, 127), (1281,), (1536,)])
def test_rounding_when_shapes_differ_leaves_few_and_marks_what_was_added(lengths: tuple[int, ...]) -> None:
    batch = rounded(batch_of(*lengths).with_scored())
    size, width = sum(lengths), batch.input_ids.shape[1]
    assert width % 128 == 0
    assert 0 <= width - size < (256 if size > 1280 else 128)
    assert batch.cu_seqlens is not None
    assert batch.scored is not None
    assert len(batch.cu_seqlens) == 17
    assert batch.cu_seqlens.tolist() == sorted(batch.cu_seqlens.tolist())
    assert int(batch.cu_seqlens[-1]) == width
    assert width // len(batch.scored) in (1, 2, 4)
    assert width % len(batch.scored) == 0
    added = batch.scored[int((batch.targets != IGNORE_INDEX).sum()) :]
    assert all(batch.targets[0, int(place)] == IGNORE_INDEX for place in added)


def test_rounding_when_there_is_noise_leaves_its_keys_as_tensors() -> None:
    batch, keys = batch_of(30, 98, 70), NoiseKeys(seed=1, step=2)
    keys.new_salt()
    noise = keys.of(batch)
    made = rounded(replace(batch.with_scored(), noise=noise))
    assert made.samples == ()
    assert made.noise is not None
    assert torch.equal(made.noise.keys[:, :198], noise.keys)
    assert torch.equal(made.noise.lengths[:, :198], noise.lengths)
    assert made.noise.lengths.shape == made.input_ids.shape
    keys.enter(made)
    assert keys.tokens is made.noise.keys  # not made anew, from what was taken away


def test_rounding_when_a_row_is_full_leaves_nothing_but_tensors_to_go_by() -> None:
    batch = rounded(batch_of(2048).with_scored())  # nothing is filled up
    assert batch.input_ids.shape[1] == 2048
    assert (batch.lengths, batch.samples, batch.num_tokens) == ((), (), 0)
    assert EqualDocuments(2048).of(batch.lengths) == 0


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [((300, 200), 512), ((1500, 500), 2048), ((100,) * 20, 512), ((513, *[100] * 15), 2048), ((900, *[390] * 8), 1024)],
)
def test_rounding_when_documents_are_short_tells_roughly_how_long(lengths: tuple[int, ...], longest: int) -> None:
    batch = rounded(batch_of(*lengths).with_scored())
    assert batch.max_seqlen == longest >= max(lengths)


@pytest.mark.parametrize("frozen", [True, False])
def test_loss_when_a_batch_is_rounded_is_that_of_the_batch(frozen: bool) -> None:
    plain = batch_of(20, 9, 31)
    torch.manual_seed(0)
    head, table = torch.randn(_VOCABULARY, _HIDDEN), torch.randn(_VOCABULARY, _HIDDEN)
    found: list[tuple[Tensor, Tensor]] = []
    for batch in (plain, replace(plain.with_scored()), rounded(plain.with_scored())):
        leaf = table.clone().requires_grad_()
        hidden = leaf[batch.input_ids]
        outputs = Outputs(hidden, lambda h: h @ head.T, head_is_frozen=frozen, scored=batch.scored)
        total = TokenLoss().loss(outputs, batch).terms["nll"].total
        total.backward()
        assert leaf.grad is not None
        found.append((total.detach(), leaf.grad))
    for total, grad in found[1:]:
        torch.testing.assert_close(total, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-5, atol=1e-6)
