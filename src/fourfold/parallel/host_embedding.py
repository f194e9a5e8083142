"""A frozen embedding that stays in host memory, and whose rows a GPU fetches as it needs them.

The table of a large vocabulary is a sixth of an 8B model in 4 bits, and a micro-batch looks up one row of it a token:
10 MB of 1 GiB, a fraction of a millisecond over PCIe.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class HostEmbedding(nn.Embedding):
    """An embedding whose table is no parameter of the model: pinned host memory that the device reads by itself."""

    def forward(self, input: Tensor) -> Tensor:
        """input [...] int64 on any device -> [..., hidden size] there."""
        if not input.is_cuda:
            return F.embedding(input, self.weight)
        from fourfold.parallel.fetch_kernel import fetch_rows

        return fetch_rows(self.weight, input.reshape(-1)).view(*input.shape, self.embedding_dim)


def keep_on_host(embedding: nn.Module) -> int:
    """Move a frozen embedding's table to host memory, in place.

    Args:
        embedding: of the model; one of another class than torch's own stays where it is.
    Returns:
        bytes that the device is spared.
    """
    if type(embedding) is not nn.Embedding or embedding.weight.requires_grad or embedding.weight.is_meta:
        return 0
    table = embedding.weight.detach()
    on_device = table.is_cuda
    table = table.cpu().pin_memory() if on_device else table
    # no parameter any more: a model's device is that of its first one, and nobody is to move it
    del embedding.weight
    embedding.weight = table  # type: ignore[assignment]
    embedding.__class__ = HostEmbedding
    return table.nbytes if on_device else 0
