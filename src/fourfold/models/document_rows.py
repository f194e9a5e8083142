"""Layers that carry a state along a row (gated delta nets, state spaces, short convolutions), on rows of documents.

They know rows, each of which begins without a state, and no documents. So within such a layer the documents of a row
are rows of their own, padded on the right; all else of the model goes on with the row. Documents of like length are
rows of one batch, and lengths that differ much are batches apart, so that little is padding.

Shape legend: B rows (packed: one), S positions of each, H hidden size, D documents of a batch, L the longest of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold.base import delta_rule_use
from fourfold.dataset.batch import to_device
from fourfold.families.recurrent import MIXERS
from fourfold.models.noise import NoiseKeys
from fourfold.models.targets import decoder_blocks
from fourfold.parallel.recompute import Remember, all_of

_FEW = {"cpu": 64, "cuda": 4096}
"""So many positions of padding cost less than a further batch, whose operators a GPU waits for: a mixer of a Qwen3.5 of
9B takes 13 ms of the host for a batch, forward and backward, and 2.5 us a position on an H200."""
_MARK = "_fourfold_document_rows"
_STATE_SPACE = "ssm_state_size"
"""Attribute that Transformers' state spaces have, and other mixers do not."""
_DOCUMENTS = "documents_of_rows"
"""Keyword argument by which decoder layers are told documents' lengths, beside what attention is told of them."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Documents that go through a layer as rows of one batch.

    Attributes:
        positions: [D L] int64, where in all rows, one behind the other, each position is; behind a document's end any.
        count, longest: D and L.
    """

    positions: Tensor
    count: int
    longest: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """All documents of some rows.

    Attributes:
        batches: in order.
        positions: of all batches, one behind the other.
        places: [B S] int64, where among these each position is.
        is_in_order: nothing is moved: documents are equally long.
    """

    batches: tuple[_Batch, ...]
    positions: Tensor
    places: Tensor
    is_in_order: bool


def alike(lengths: Sequence[int], few: int = _FEW["cpu"]) -> list[list[int]]:
    """Documents, by number, in batches: each is at least half as long as the longest of its batch, but for `few`
    positions of padding."""
    batches: list[list[int]] = []
    left = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = lengths[batches[-1][0]] if batches else 0
        padding = longest - lengths[number]
        if batches and padding <= max(longest // 2, left):
            batches[-1].append(number)
            left -= padding if padding > longest // 2 else 0
        else:
            batches.append([number])
            left = few
    return batches


def _lay_out(lengths: Sequence[int], device: torch.device) -> _Layout:
    """How documents of these lengths, which lie one behind the other, are cut into batches."""
    sizes = np.array(lengths)
    starts = sizes.cumsum() - sizes
    places, batches, done = np.empty(sizes.sum(), dtype=np.int64), [], 0
    for numbers in alike(lengths, _FEW.get(device.type, _FEW["cuda"])):
        longest = lengths[numbers[0]]
        along = np.arange(longest)
        positions = starts[numbers][:, None] + along
        there = along < sizes[numbers][:, None]
        places[positions[there]] = done + np.flatnonzero(there)
        batches.append((positions.clip(max=len(places) - 1).reshape(-1), len(numbers), longest))
        done += positions.size
    together = np.concatenate([positions for positions, *_ in batches])
    everywhere = to_device(torch.tensor(together), device)
    cut = everywhere.split([len(positions) for positions, *_ in batches])
    return _Layout(
        tuple(_Batch(positions, *size) for positions, (_, *size) in zip(cut, batches, strict=True)),
        everywhere,
        to_device(torch.tensor(places), device),
        is_in_order=bool(np.array_equal(together, np.arange(len(places)))),
    )


class _Spread(torch.autograd.Function):
    """Rows of all batches, [B*S H] -> [all D L, H]. What is behind a document's end has no gradient."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """Gathered."""
        ctx.save_for_backward(places)
        return flat.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gathered back: each position is once among those that count."""
        [places] = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class _Collected(torch.autograd.Function):
    """The way back, [all D L, H] -> [B*S H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        """Gathered."""
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Put where they were, zero behind documents' ends."""
        [places] = ctx.saved_tensors
        return grad.new_zeros((ctx.count, *grad.shape[1:])).index_copy_(0, places, grad), None


class DocumentRows:
    """What a model's recurrent layers know of the rows that go through them."""

    def __init__(self, noise: NoiseKeys | None) -> None:
        self._noise = noise
        self._lengths: tuple[int, ...] | None = None
        self._laid_out: tuple[tuple[int, ...], _Layout] | None = None

    def set_noise(self, noise: NoiseKeys | None) -> None:
        """Key noise otherwise from now on."""
        self._noise = noise

    def note(self, _layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook of a decoder layer, before its forward pass: take its documents' lengths out of its arguments. What is
        compiled of it would be made anew for other lengths."""
        self._lengths = kwargs.get(_DOCUMENTS)
        return args, {name: value for name, value in kwargs.items() if name != _DOCUMENTS}

    def remembered(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes contexts with the lengths of now, for layers computed again after another row was noted."""
        return functools.partial(self._with, self._lengths)

    @contextmanager
    def _with(self, lengths: tuple[int, ...] | None) -> Iterator[None]:
        current, self._lengths = self._lengths, lengths
        try:
            yield
        finally:
            self._lengths = current

    def run(self, own: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`own` on each document by itself, [B, S, H] -> [B, S, H]; on rows as they are if no lengths were given."""
        lengths = self._lengths
        if lengths is None:
            return own(hidden_states, *args, **kwargs)
        if len(lengths) == 1:
            return own(hidden_states)
        found: list[Tensor] = []
        flat = hidden_states.flatten(0, 1)
        layout = self._layout(lengths, flat.device)
        spread = flat if layout.is_in_order else _Spread.apply(flat, layout.positions, layout.places)
        assert isinstance(spread, Tensor)
        parts = spread.split([len(batch.positions) for batch in layout.batches])
        for batch, part in zip(layout.batches, parts, strict=True):
            rows = part.unflatten(0, (batch.count, batch.longest))
            noise = self._noise
            keyed = (
                nullcontext() if noise is None else noise.of_positions(batch.positions, (batch.count, batch.longest))
            )
            with keyed:
                found.append(own(rows).flatten(0, 1))
        together = found[0] if len(found) == 1 else torch.cat(found)
        collected = together if layout.is_in_order else _Collected.apply(together, layout.places)
        assert isinstance(collected, Tensor)
        return collected.view_as(hidden_states)

    def _layout(self, lengths: tuple[int, ...], device: torch.device) -> _Layout:
        """Kept until another row comes, which all layers see before the next."""
        if self._laid_out is None or self._laid_out[0] != lengths:
            self._laid_out = lengths, _lay_out(lengths, device)
        return self._laid_out[1]


def document_rows(model: nn.Module) -> DocumentRows | None:
    """What the recurrent layers of a model share; None where it has none, or `keep_documents_apart` was not called."""
    return getattr(model, _MARK, None)


def has_mixers(model: PreTrainedModel) -> bool:
    """Whether a model has recurrent layers, and all of them are known."""
    return model.config.get_text_config().model_type in MIXERS


def find_mixers(model: PreTrainedModel) -> list[nn.Module]:
    """What carries a state in a model's layers; nothing where it has no such layers, or they are not known."""
    name = MIXERS.get(model.config.get_text_config().model_type)
    found = [] if name is None else [getattr(layer, name, None) for layer in decoder_blocks(model)[1]]
    return [mixer for mixer in found if mixer is not None]


def told_of(model: nn.Module, lengths: tuple[int, ...]) -> dict[str, object]:
    """Keyword arguments of a model that tell its recurrent layers how long documents are; none for other models."""
    return {} if document_rows(model) is None else {_DOCUMENTS: lengths}


def read_besides(model: nn.Module, noise: NoiseKeys) -> Remember:
    """What remembers all that a model's layers read besides their inputs, for those that are computed again."""
    rows = document_rows(model)
    return all_of(noise.remembered, *([] if rows is None else [rows.remembered]))


def keep_documents_apart(model: PreTrainedModel, noise: NoiseKeys | None) -> None:
    """Have a model's recurrent layers keep documents apart of which it is told (`told_of`), in place.

    Calling it again changes the noise alone.

    Args:
        noise: what is keyed by position within them; None if nothing is.
    """
    if not has_mixers(model):
        return
    rows = document_rows(model)
    if rows is not None:
        rows.set_noise(noise)
        return
    delta_rule_use.install(model, model.device)
    rows = DocumentRows(noise)
    setattr(model, _MARK, rows)
    for layer in decoder_blocks(model)[1]:
        layer.register_forward_pre_hook(rows.note, with_kwargs=True)
    for mixer in find_mixers(model):
        mixer.forward = MixerForward(mixer, rows)


class MixerForward:
    """Stands in for the `forward` of what carries a state: it is called with rows of documents.

    Attributes:
        run: what is called with each batch of documents: the mixer's own forward pass, or the same compiled.
        has_shortcut: while it trains, kernels may read its last matrix.
    """

    def __init__(self, mixer: nn.Module, rows: DocumentRows) -> None:
        self._mixer, self._rows = mixer, rows
        self.run: Callable[..., Tensor] = mixer.forward
        self.has_shortcut = hasattr(mixer, _STATE_SPACE)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self._rows.run(self._call, hidden_states, *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mixer itself.

        Transformers' state spaces have a kernel for training that reads their last matrix, and so passes by what it is
        wrapped with: an adapter, or 4 bits. (Read in Transformers 5.17 and 5.24.)
        """
        mixer = self._mixer
        if not (self.has_shortcut and mixer.training) or type(mixer.out_proj) is nn.Linear:
            return self.run(*args, **kwargs)
        mixer.training = False  # of the mixer alone: what it consists of trains on
        try:
            return self.run(*args, **kwargs)
        finally:
            mixer.training = True
