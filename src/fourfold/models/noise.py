"""Dropout and noise keyed by (seed, step, sample, position), so that they do not depend on how a step is cut.

A generator hands out numbers in the order they are asked for; cut the same samples differently and each gets other
ones. Here every number is a hash of where it is used: packing, accumulation, recompute and the layout change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fourfold.base.peft import LoraLayer
from fourfold.dataset.batch import Batch, Noise, to_device
from fourfold.models.unwrap import base_model

_BITS = 24
_GOLDEN = -1640531527  # 2**32 / golden ratio, as int32


def hash32(values: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser, elementwise on int32 (products wrap)."""
    for multiplier, shift in ((-2048144789, 16), (-1028477387, 13)):
        values = values ^ ((values >> shift) & ((1 << (32 - shift)) - 1))
        values = values * multiplier
    return values ^ ((values >> 16) & 0xFFFF)


@dataclass
class NoiseKeys:
    """The keys of the micro-batch that is being run.

    Attributes:
        seed: the run's.
        step: optimizer step, set by the loop.
        tokens: [B, S] int32, one key a position.
        lengths: [B, S] fp32, length of the document a position is in (1 for padding).
        device: where the salts lie.
    """

    seed: int
    step: int = 0
    tokens: Tensor | None = None
    lengths: Tensor | None = None
    salts: int = field(default=0)
    device: torch.device = field(default=torch.device("cpu"))

    def of(self, batch: Batch) -> Noise:
        """The keys of a micro-batch, on its device."""
        device = batch.input_ids.device
        owners = [mix32(self.seed, self.step, sample, role) for sample, role in batch.samples]
        table = to_device(torch.tensor([*owners, 0], dtype=torch.int32), device)
        documents = batch.document_ids.long()  # -1, padding, takes the last entry
        sizes = to_device(torch.tensor([*batch.lengths, 1], dtype=torch.float32), device)
        return Noise(hash32(table[documents] + batch.position_ids.int() * _GOLDEN), sizes[documents])

    def enter(self, batch: Batch) -> None:
        """Take the keys of a micro-batch, or make them."""
        self.tokens, self.lengths = batch.noise or self.of(batch)

    def remembered(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes contexts with the keys of now, for layers computed again after another micro-batch was entered."""
        return partial(self._with, self.tokens, self.lengths)

    def of_positions(self, positions: Tensor, shape: tuple[int, int]) -> AbstractContextManager[None]:
        """Within it the keys are those of some flat positions [N] of the micro-batch, laid out as rows, B S = N."""
        if self.tokens is None or self.lengths is None:
            return nullcontext()
        tokens, lengths = (t.reshape(-1).index_select(0, positions).view(shape) for t in (self.tokens, self.lengths))
        return self._with(tokens, lengths)

    @contextmanager
    def _with(self, tokens: Tensor | None, lengths: Tensor | None) -> Iterator[None]:
        current = self.tokens, self.lengths
        self.tokens, self.lengths = tokens, lengths
        try:
            yield
        finally:
            self.tokens, self.lengths = current

    def new_salt(self) -> Tensor:
        """A number that tells one user of the keys from another: int32, and a tensor, so that a compiled function is
        not made for each of them."""
        self.salts += 1
        return torch.tensor(mix32(self.salts), dtype=torch.int32, device=self.device)

    def bits(self, features: int, salt: Tensor, first: int = 0) -> Tensor:
        """[B, S, features] int32 in [0, 2**24), for features from `first` on."""
        assert self.tokens is not None, "no micro-batch has been entered"
        columns = torch.arange(first, first + features, dtype=torch.int32, device=self.tokens.device)
        per_feature = hash32(columns * _GOLDEN + salt)
        return hash32(self.tokens[..., None] ^ per_feature) & ((1 << _BITS) - 1)


def mix32(*numbers: int) -> int:
    """One int32 from several integers."""
    state = 0x9E3779B9
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFF)) * 0x85EBCA6B) & 0xFFFFFFFF
        state ^= state >> 15
    return state - (1 << 32) if state >= 1 << 31 else state


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of the keys; the inputs' rows are the positions of the micro-batch.

    Attributes:
        first_feature: which of the whole layer's features the inputs start with, where ranks share them.
    """

    def __init__(self, probability: float, keys: NoiseKeys) -> None:
        super().__init__()
        self.p, self._keys, self._salt = probability, keys, keys.new_salt()
        self.first_feature = 0

    def forward(self, x: Tensor) -> Tensor:
        """x [..., features] with B * S rows -> the same shape; each element 0 or x / (1 - p)."""
        if not self.training:
            return x
        keep = self._keys.bits(x.shape[-1], self._salt, self.first_feature) >= round(self.p * (1 << _BITS))
        return x * keep.view(x.shape) * (1.0 / (1.0 - self.p))

    def extra_repr(self) -> str:
        """Shown in the model's print."""
        return f"p={self.p}"


def key_dropout(module: nn.Module, keys: NoiseKeys) -> int:
    """Replace the dropout of every LoRA layer by the keyed one; returns how many."""
    count = 0
    for layer in module.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                layer.lora_dropout[name] = KeyedDropout(dropout.p, keys)
                count += 1
    return count


def add_neftune(module: nn.Module, keys: NoiseKeys, alpha: float) -> None:
    """Add uniform noise to the input embeddings while training (NEFTune, arXiv:2310.05914).

    noise = u * alpha / sqrt(L * d), u uniform in [-1, 1), L the document's length, d the hidden size.
    """
    salt = keys.new_salt()

    def disturb(embedding: nn.Module, args: object, output: Tensor) -> Tensor:
        if not embedding.training or keys.lengths is None:
            return output
        uniform = keys.bits(output.shape[-1], salt).float() * (2.0 / (1 << _BITS)) - 1.0
        scale = alpha / (keys.lengths * output.shape[-1]).sqrt()
        return output + (uniform * scale[..., None]).to(output.dtype)

    base_model(module).get_input_embeddings().register_forward_hook(disturb)
