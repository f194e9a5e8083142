"""The shape of a model, as plain numbers: every parameter, by layer and kind, and what of it can be cut.

Read once from a model without weights (`read_shape.py`) and kept as JSON, so that planning needs no torch.

Shape legend: E experts, H hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

Kind = Literal["embedding", "attention", "mlp", "experts", "router", "norm", "head", "other"]
KINDS: tuple[Kind, ...] = ("embedding", "attention", "mlp", "experts", "router", "norm", "head", "other")

FORMAT = 5
"""Version of the JSON; files of another one are read anew."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter.

    Attributes:
        name: within its layer, or of the model for what no layer has.
        shape: [out, in] of a linear layer, [E, ., .] of stacked experts.
        kind: what it is for.
        cut: the dimension along which tensor-parallel ranks share it; None if each has it whole.
        of_kv: cut by key heads, of which there may be fewer than ranks.
        linear: the matrix of a linear layer: adapters and 4-bit packing are for these.
        gathered: tensor-parallel ranks, which share it, put together what it makes, since what follows needs all of it.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    cut: int | None = None
    of_kv: bool = False
    linear: bool = False
    gathered: bool = False

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it takes part in products (and is no table to look up in, nor a convolution)."""
        return self.kind == "experts" or (len(self.shape) == 2 and self.kind != "embedding")

    @property
    def largest_matrix(self) -> int:
        """Numbers of its largest single matrix: of stacked experts, one."""
        return self.numel // self.shape[0] if self.kind == "experts" and len(self.shape) == 3 else self.numel


@dataclass(frozen=True, slots=True)
class Layer:
    """One kind of decoder layer.

    Attributes:
        weights: its parameters.
        window: positions that attention sees back, itself included; None for all.
        state_bytes: that what carries a state along the row keeps of each position in 16 bits, 0 where nothing does.
        attends: whether it has attention.
        kv_heads, head_dim: of its attention, where layers differ; 0 for the model's.
    """

    weights: tuple[Weight, ...]
    window: int | None = None
    state_bytes: int = 0
    attends: bool = True
    kv_heads: int = 0
    head_dim: int = 0

    @property
    def numel(self) -> int:
        """Parameters."""
        return sum(weight.numel for weight in self.weights)

    def cut_by(self, kind: Kind, tp: int) -> int:
        """Of `tp` ranks, how many share a part's matrices: all, or one."""
        return tp if any(weight.cut is not None for weight in self.weights if weight.kind == kind) else 1

    def split_by(self, kind: Kind, tp: int) -> int:
        """Of `tp` ranks, how many share its heads or channels: one where what its matrices make is put together."""
        is_whole = any(weight.gathered for weight in self.weights if weight.kind == kind)
        return 1 if is_whole else self.cut_by(kind, tp)

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(weight.kind == "experts" for weight in self.weights)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model.

    Attributes:
        family: Transformers' `model_type`.
        hidden, intermediate: H; I of a dense MLP, 0 where there is none.
        heads, kv_heads, head_dim, value_dim: of attention; sizes of one head's query or key, and of its value.
        vocab: V, rows of the embedding.
        max_positions: context length.
        tied: whether the head is the embedding.
        experts, experts_per_token, expert_intermediate: of a mixture of experts; 0 otherwise.
        gated: whether the MLP has a gate beside the up projection.
        kinds: the different layers; `order` tells for each layer which.
        outer: what no layer holds: embedding, last norm, head (left out where tied).
        own_bits, own_double_quant: of a checkpoint that bitsandbytes has quantised, the bits of its linear layers and
            whether their scales are quantised, too; None and False for plain weights.
        refused: (axis, why) of what the engine cannot split it by.
        by_offsets: its attention needs nothing but where documents begin: all layers take it from Transformers'
            interface, without dropout.
        caps_scores: its scores are soft-capped, which few cards have a kernel for (gemma 2).
        changed_logits: how often logits are made anew before they are scored: once for a scale, twice for a cap, whose
            backward pass needs what lies between.
    """

    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocab: int
    max_positions: int
    tied: bool
    experts: int
    experts_per_token: int
    expert_intermediate: int
    gated: bool
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    outer: tuple[Weight, ...]
    own_bits: int | None = None
    own_double_quant: bool = False
    refused: tuple[tuple[str, str], ...] = ()
    by_offsets: bool = True
    caps_scores: bool = False
    changed_logits: int = 0

    @property
    def carries_state(self) -> bool:
        """Whether some of its layers carry a state along the row."""
        return any(layer.state_bytes or not layer.attends for layer in self.kinds)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, each.name) for each in fields(self)))

    def of_layer(self, layer: Layer) -> ModelShape:
        """The same model with the heads that a layer has."""
        return _with_heads(self, layer.kv_heads, layer.head_dim) if layer.head_dim else self

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.order)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every decoder layer, first to last."""
        return tuple(self.kinds[number] for number in self.order)

    @cached_property
    def numel(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(layer.numel for layer in self.layers) + sum(weight.numel for weight in self.outer)

    @cached_property
    def active(self) -> int:
        """Parameters that take part in a token's forward pass: of the experts only the chosen ones, no look-up."""
        return sum(self.active_of(weight) for weight in self.weights()) + (self.vocab * self.hidden if self.tied else 0)

    def active_of(self, weight: Weight) -> int:
        """Of one parameter, the numbers that a token is multiplied with."""
        if weight.kind == "embedding":
            return 0
        if weight.kind == "experts":
            return weight.numel * self.experts_per_token // self.experts
        return weight.numel

    def weights(self) -> Iterator[Weight]:
        """Every parameter of the model."""
        for layer in self.layers:
            yield from layer.weights
        yield from self.outer

    @cached_property
    def by_kind(self) -> dict[Kind, int]:
        """Parameters of each kind that there is."""
        found: Counter[Kind] = Counter()
        for weight in self.weights():
            found[weight.kind] += weight.numel
        return {kind: found[kind] for kind in KINDS if found[kind]}

    @cached_property
    def largest_layer(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(layer.numel for layer in self.kinds)

    @cached_property
    def largest_matrix(self) -> Weight:
        """The parameter that has the largest single matrix."""
        return max(self.weights(), key=lambda weight: weight.largest_matrix)

    def as_json(self) -> dict[str, Any]:
        """For the cache."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, entries: dict[str, Any]) -> ModelShape:
        """The reverse of `as_json`.

        Raises:
            ValueError: another version wrote it.
        """
        if entries.get("format") != FORMAT:
            raise ValueError(f"a shape of format {entries.get('format')}, not {FORMAT}")
        fields = {key: value for key, value in entries.items() if key != "format"}
        kinds = tuple(Layer(**{**layer, "weights": _weights(layer["weights"])}) for layer in fields.pop("kinds"))
        outer, order = _weights(fields.pop("outer")), tuple(fields.pop("order"))
        refused = tuple((str(axis), str(why)) for axis, why in fields.pop("refused"))
        return cls(**fields, kinds=kinds, order=order, outer=outer, refused=refused)


def _weights(entries: Iterable[dict[str, Any]]) -> tuple[Weight, ...]:
    return tuple(Weight(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries)


@lru_cache(maxsize=64)
def _with_heads(shape: ModelShape, kv_heads: int, head_dim: int) -> ModelShape:
    return replace(shape, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim)
