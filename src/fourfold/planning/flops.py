"""Floating-point operations of a model: which products a token goes through, forward and backward.

A product of an [m, k] by a [k, n] matrix counts 2 m n k. With y = x W^T a backward pass has the gradient of the input,
dy W, and for a trained W its gradient, dy^T x: as many operations each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.shape import Layer, ModelShape, Weight
from fourfold.planning.states import gets_adapter

Mode = Literal["trained", "adapted", "frozen"]
"""Of a layer: its weights are trained; adapters beside them are; nothing is, nor in a layer below it."""

FLASH_BACKWARD = 2.5
"""Of flash attention, operations of the backward pass for each of the forward pass: five products to its two, since
scores are made again (arXiv:2205.14135, appendix B)."""
NEEDED_BACKWARD = 2.0
"""The same without making scores again: what counts as the model's own work."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix that tokens are multiplied with, or the experts that they choose among, as one rank has it.

    Attributes:
        rows, columns: output and input features on this rank.
        groups: matrices in it: experts of this rank, 1 for a plain matrix.
        rows_of_token: how often a token goes through it: 1, or of experts as many as it chooses.
        adapter: rank of the adapter on it, 0 without.
        packed: whether its weight lies in 4 bits.
    """

    rows: int
    columns: int
    groups: int = 1
    rows_of_token: float = 1.0
    adapter: int = 0
    packed: bool = False

    @property
    def numel(self) -> int:
        """Weights on this rank, those of the adapter aside."""
        return self.rows * self.columns * self.groups

    @property
    def adapter_numel(self) -> int:
        """Weights of the adapter on this rank; each of stacked experts has its own."""
        return self.adapter * (self.rows + self.columns) * self.groups

    @property
    def flops(self) -> float:
        """Of one token, forward, the adapter aside; as much for each of the two gradients."""
        return 2.0 * self.rows * self.columns * self.rows_of_token

    @property
    def adapter_flops(self) -> float:
        """Of one token through the adapter, forward; twice as much backward."""
        return 2.0 * self.adapter * (self.rows + self.columns) * self.rows_of_token


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of one direction each.

    Attributes:
        forward: of the forward pass.
        input_grad: of the gradients that go on to the layer before; attention's and adapters' backward pass is here.
        weight_grad: of the gradients of trained weights.
    """

    forward: float
    input_grad: float
    weight_grad: float

    @property
    def backward(self) -> float:
        """Both gradients."""
        return self.input_grad + self.weight_grad

    @property
    def total(self) -> float:
        """All."""
        return self.forward + self.backward


def parts_of(weight: Weight, shape: ModelShape, layout: Layout) -> int:
    """Parts into which tensor and expert parallelism cut a weight."""
    parts = layout.ep if weight.kind == "experts" and len(weight.shape) == 3 else 1
    if weight.cut is None:
        return parts
    return parts * (min(layout.tp, shape.kv_heads) if weight.of_kv else layout.tp)


def local_numel(weight: Weight, shape: ModelShape, layout: Layout) -> float:
    """Numbers of a weight on one rank before data parallelism shards it."""
    return weight.numel / parts_of(weight, shape, layout)


@lru_cache(maxsize=1024)
def layer_products(shape: ModelShape, kind: int, job: Job, tp: int = 1, ep: int = 1) -> tuple[Product, ...]:
    """The products of one layer on one rank.

    Args:
        kind: which of `shape.kinds`.
    """
    layout = Layout(tp=tp, ep=ep, dp_shard=ep)
    return tuple(_product(weight, shape, job, layout) for weight in shape.kinds[kind].weights if _multiplies(weight))


def num_regions(layer: Layer) -> int:
    """Parts of a layer with matrices, at whose borders tensor-parallel ranks exchange: attention, MLP."""
    return len({weight.name.split(".")[0] for weight in layer.weights if _multiplies(weight)})


def weight_groups(layer: Layer, job: Job, mode: Mode) -> int:
    """Groups of a layer's weights that get their gradients one by one where a backward pass has two parts: what is
    computed again is so for each of them (torch.distributed.pipelining's stage_backward_weight). An adapter has two.
    """
    if mode == "adapted":
        return 2 * sum(gets_adapter(job, weight) for weight in layer.weights)
    return sum(_multiplies(weight) or weight.kind == "norm" for weight in layer.weights) if mode == "trained" else 0


def _multiplies(weight: Weight) -> bool:
    return weight.is_matrix and weight.kind != "norm"


def _product(weight: Weight, shape: ModelShape, job: Job, layout: Layout) -> Product:
    stacked = weight.kind == "experts" and len(weight.shape) == 3
    sizes = list(weight.shape[1:] if stacked else weight.shape)
    if weight.cut is not None:
        parts = min(layout.tp, shape.kv_heads) if weight.of_kv else layout.tp
        sizes[weight.cut - stacked] = math.ceil(sizes[weight.cut - stacked] / parts)
    choices = 1.0
    if weight.kind == "experts":
        choices = float(shape.experts_per_token) if stacked else shape.experts_per_token / shape.experts
    return Product(
        rows=sizes[0],
        columns=math.prod(sizes[1:]),
        groups=weight.shape[0] // layout.ep if stacked else 1,
        rows_of_token=choices,
        adapter=job.lora_rank if gets_adapter(job, weight) else 0,
        packed=job.bits is not None and weight.linear,
    )


def visible_keys(sequence: int, window: int | None) -> float:
    """Keys that a query of causal attention sees on average in a document of so many positions: half of them.

    With a window of w < S: w, less the w^2 / 2 pairs that the first w queries lack.
    """
    if window is None or window >= sequence:
        return sequence / 2
    return window - window * window / (2 * sequence)


def attention_flops(shape: ModelShape, layer: Layer, sequence: int, heads: float | None = None) -> float:
    """Scores and weighted values of one token, forward.

    Args:
        heads: of this rank; None for all.
    """
    heads, shape = shape.heads if heads is None else heads, shape.of_layer(layer)
    return 2.0 * visible_keys(sequence, layer.window) * heads * (shape.head_dim + shape.value_dim)


def mode_of(job: Job, number: int, num_layers: int) -> Mode:
    """What is trained in a layer."""
    if job.tuning == "freeze":
        return "trained" if number >= num_layers - job.trained_layers else "frozen"
    return "trained" if job.tuning == "full" else "adapted"


def layer_flops(shape: ModelShape, kind: int, job: Job, mode: Mode) -> Flops:
    """The model's own work for one token in one layer, on all ranks together; nothing is computed again."""
    products = layer_products(shape, kind, job)
    linear = sum(product.flops for product in products)
    adapters = sum(product.adapter_flops for product in products)
    attention = attention_flops(shape, shape.kinds[kind], job.sequence)
    forward = linear + adapters + attention
    if mode == "frozen":
        return Flops(forward, 0.0, 0.0)
    grads = linear + 2 * adapters + NEEDED_BACKWARD * attention
    return Flops(forward, grads, linear if mode == "trained" else 0.0)


def head_flops(shape: ModelShape, job: Job) -> Flops:
    """The model's own work for the logits of one position of a sequence, of which a share is trained on."""
    product = 2.0 * shape.hidden * shape.vocab * job.trained_share
    return Flops(product, product, product if job.tuning == "full" else 0.0)


@lru_cache(maxsize=256)
def model_flops(shape: ModelShape, job: Job) -> float:
    """The model's own work for one token: with full tuning 6 N and attention (6 layers x hidden x sequence, where heads
    make up the hidden size), N without the embedding, which is a look-up."""
    total = head_flops(shape, job).total
    for kind, mode, count in _layer_counts(shape, job):
        total += count * layer_flops(shape, kind, job, mode).total
    return total


def _layer_counts(shape: ModelShape, job: Job) -> list[tuple[int, Mode, int]]:
    counts: dict[tuple[int, Mode], int] = {}
    for number, kind in enumerate(shape.order):
        key = (kind, mode_of(job, number, shape.num_layers))
        counts[key] = counts.get(key, 0) + 1
    return [(kind, mode, count) for (kind, mode), count in counts.items()]
