"""Attention of documents that are equally long, as full rows of a pretraining text are: a plain batch of them.

cuDNN's kernels for Hopper and later take two thirds of the time of torch's kernel for documents of any lengths, but
make a plan for each shape, which takes a tenth of a second; so only shapes that come back are given to them: full rows,
and others from their third time on. (H100, 32 and 8 heads of 128, forward and backward: 2.39 ms against 3.76 for 2
rows of 4,096, 14.9 against 24.0 for 16,384, 1.19 against 1.48 for 8 of 1,024.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LEAST_POSITIONS = 1024
"""Of a document: shorter ones take little of a layer's time."""
_TIMES_BEFORE = 2
"""How often a shape was seen before it is taken."""
_MOST_SHAPES = 8
_WIDEST_HEAD = 128


class EqualDocuments:
    """Says of each row whether its documents are equally long, in a shape that comes back.

    Args:
        full: length of a document that fills its row, as most of a cut text do.
    """

    def __init__(self, full: int) -> None:
        self._full = full
        self._seen: Counter[tuple[int, int]] = Counter()

    def of(self, lengths: Sequence[int]) -> int:
        """How many documents fill a row; 0 where they are not to be taken as equal.

        Args:
            lengths: of the documents of one packed row; empty where they are not to be known, since it is recorded.
        """
        if len(set(lengths)) != 1 or lengths[0] < _LEAST_POSITIONS:
            return 0
        shape = (len(lengths), lengths[0])
        if shape not in self._seen and len(self._seen) == _MOST_SHAPES:
            return 0
        self._seen[shape] += 1
        comes_back = lengths[0] == self._full or self._seen[shape] > _TIMES_BEFORE
        return len(lengths) if comes_back else 0


def has_kernel(device: torch.device) -> bool:
    """Whether a device's kernel for equal documents is the faster one."""
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes heads of such widths in such a dtype; of queries and values [..., d]."""
    width = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and width == value.shape[-1] and width % 8 == 0 and width <= _WIDEST_HEAD


_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define(
    "equal_documents(Tensor query, Tensor key, Tensor value, SymInt documents, float? scale) -> (Tensor, Tensor)"
)
_OPERATORS.define(
    "equal_documents_back(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor sums, "
    "SymInt documents, float? scale) -> (Tensor, Tensor, Tensor)"
)


def _as_batch(tensor: Tensor, documents: int) -> Tensor:
    """[1, heads, S, d] -> [documents, heads, S / documents, d], a view."""
    return tensor[0].transpose(0, 1).unflatten(0, (documents, -1)).transpose(1, 2)


def _as_row(tensor: Tensor) -> Tensor:
    """Back, in memory [S, heads, d]."""
    return tensor.transpose(1, 2).contiguous().flatten(0, 1).transpose(0, 1)[None]


@torch.library.impl(_OPERATORS, "equal_documents", "CUDA")
def _forward(query: Tensor, key: Tensor, value: Tensor, documents: int, scale: float | None) -> tuple[Tensor, Tensor]:
    batch = (_as_batch(tensor, documents) for tensor in (query, key, value))
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *batch, None, compute_log_sumexp=True, dropout_p=0.0, is_causal=True, scale=scale
    )
    return _as_row(out), sums


def empty_row(tensor: Tensor) -> Tensor:
    """[1, heads, S, d], in memory [S, heads, d]."""
    _, heads, length, width = tensor.shape
    return tensor.new_empty(1, length, heads, width).transpose(1, 2)


@torch.library.register_fake("fourfold::equal_documents", lib=_OPERATORS)
def _forward_of_fakes(
    query: Tensor, key: Tensor, value: Tensor, documents: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    _, heads, length, _ = query.shape
    return empty_row(query), query.new_empty((documents, heads, length // documents, 1), dtype=torch.float32)


@torch.library.impl(_OPERATORS, "equal_documents_back", "CUDA")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    documents: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    length, no_dropout = query.shape[2] // documents, torch.empty((), dtype=torch.int64, device=query.device)
    batch = (_as_batch(tensor, documents) for tensor in (grad, query, key, value, out))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *batch, sums, no_dropout, no_dropout, None, None, None, length, length, 0.0, True, scale=scale
    )
    query_grad, key_grad, value_grad = (_as_row(tensor) for tensor in found)
    return query_grad, key_grad, value_grad


@torch.library.register_fake("fourfold::equal_documents_back", lib=_OPERATORS)
def _backward_of_fakes(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    documents: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_row(query), empty_row(key), empty_row(value)


class _EqualDocuments(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: int, scale: float | None
    ) -> Tensor:
        out, sums = torch.ops.fourfold.equal_documents(query, key, value, documents, scale)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.documents, ctx.scale = documents, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        return *torch.ops.fourfold.equal_documents_back(grad, *saved, ctx.documents, ctx.scale), None, None


def equal_documents(query: Tensor, key: Tensor, value: Tensor, documents: int, scale: float | None) -> Tensor:
    """Causal attention within each of the equally long documents of a row.

    What turns a row into a batch is within the operator: a compiler would write queries and keys heads first, which
    divides by the row's unknown length, and turn them around in a second pass.

    Args:
        query: [1, heads, S, d] in 16 bits; `takes` says which.
        key, value: [1, KV heads, S, d].
        documents: how many there are.
        scale: factor on the scores; None for d ** -0.5.
    Returns:
        [1, S, heads, d].
    """
    out = _EqualDocuments.apply(query, key, value, documents, scale)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)
