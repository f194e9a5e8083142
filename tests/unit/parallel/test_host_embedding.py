"""A frozen embedding in host memory looks up what it looked up before, and is no parameter any more."""

from __future__ import annotations

import torch
from torch import nn

from fourfold.parallel.host_embedding import HostEmbedding, keep_on_host


class _Scaled(nn.Embedding):
    pass


def test_embedding_when_kept_on_the_host_gives_the_same_rows_and_is_no_parameter() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2))
    embedding: nn.Embedding = model[0]  # type: ignore[assignment]
    embedding.weight.requires_grad_(False)
    ids = torch.tensor([[3, 0, 10], [3, 3, 7]])
    expected = embedding(ids)
    keep_on_host(embedding)
    assert isinstance(embedding, HostEmbedding)
    assert torch.equal(embedding(ids), expected)
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]
    assert list(model.state_dict()) == ["1.weight", "1.bias"]
    assert model.to(torch.float64)[0](ids).dtype == torch.float32  # nobody moves it


def test_embedding_when_it_is_trained_or_not_a_plain_one_stays() -> None:
    trained, scaled = nn.Embedding(11, 4), _Scaled(11, 4)
    scaled.weight.requires_grad_(False)
    for embedding in (trained, scaled):
        kind = type(embedding)
        assert keep_on_host(embedding) == 0
        assert type(embedding) is kind
        assert len(list(embedding.parameters())) == 1
