"""Bytes that the forward pass keeps of each position for the backward pass, layer by layer.

Derived from what autograd saves of the engine's own operators, and equal to it to the byte for llama-like layers
(tests/unit/planning/test_estimated_memory.py traces the engine). In units of bytes per position of a layer, with c
bytes of the compute dtype, H hidden size, q = heads x head size, v = heads x value size, I intermediate size:

- each norm over hidden states keeps its input in fp32 (4 H), and its result before the weight if that is trained (c H);
- inputs of matrices that are trained or have an adapter: c H for attention, c H and c I for the MLP;
- attention: queries, keys and values as the kernel takes them (every query head has its key, but for kernels of our own
  over positions that ranks share), its result, c v, and 4 bytes a head;
- the gated MLP: gate, up and the activated gate, 3 c I;
- what carries a state along the row: what is found by running it without numbers (`Layer.state_bytes`).

`selective` keeps a layer's input and the results of products; `full` the input alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fourfold.families.norms import NORMS_IN_FP32
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.shape import Layer, ModelShape, Weight
from fourfold.planning.states import gets_adapter

_CHOICE_BYTES = 30
"""Numbers of experts, orders and weights that each choice of a token keeps: three int64, one fp32, one of 16 bits."""
_SENT_BYTES = 14
"""More of a choice that is sent to another rank: two int64 for its place there, and not the one of 16 bits."""


_COMPILED_SHARE = 0.45
"""Of what lies between products, what the compiler keeps: 34 GiB in all of a Llama-3-8B, LoRA, 8,192 tokens, H100."""
_COMPILED_SHARE_OF_TRAINED = 0.3
"""The same where the layers' own weights are trained: Llama-3.2-3B of 59.4 GiB with 8,192 tokens, H100; and a rank's
part of a Llama-3-8B, of 53.2 GiB with 6,144."""
_COMPILED_SHARE_IN_FLOAT8 = 0.155
"""The same where products are in float8, whose inputs are kept in a byte: Llama-3.2-3B of 56.5 GiB with 8,192 tokens,
and a rank's part of a Llama-3-8B, of 57.3 GiB with as many, H100."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one position of a micro-batch on one rank, of one layer.

    Attributes:
        none, selective, full: kept by each kind of recompute.
        compiled: kept by a compiled layer: results of products and of attention, and some of what lies between them.
        working: what the backward pass of the layer needs beside what is kept without recompute.
    """

    none: float
    selective: float
    full: float
    compiled: float
    working: float

    def of(self, recompute: Recompute) -> float:
        """Kept under a kind of recompute."""
        return {"none": self.none, "selective": self.selective, "full": self.full}[recompute]


@lru_cache(maxsize=4096)
def kept(shape: ModelShape, job: Job, layout: Layout, kind: int, *, trained: bool) -> Kept:
    """What a layer keeps.

    Args:
        layout: `Layout.of_a_layer` is enough, and many layouts have the same.
        kind: of the layer, as `ModelShape.order` has it.
        trained: whether its own weights are.
    """
    layer = shape.kinds[kind]
    shape = shape.of_layer(layer)
    c, tp, hidden = job.compute_bytes, layout.tp, shape.hidden
    positions = 1 / tp if tp > 1 and layout.sequence_parallel else 1.0  # of what exists between regions
    own = layer.split_by("attention", tp)
    factor = 4 if shape.family in NORMS_IN_FP32 else c
    between = _norms(layer, hidden, trained, factor) * positions
    low = _low_rank(job, layer) + (_copied_inputs(job, layout, layer, hidden) if layout.splits_backward else 0.0)
    learns_mlp = (trained and not _dense_width(layer)) or _learns(job, layer, "mlp", trained=trained)
    inputs = c * hidden * (_learns(job, layer, "attention", trained=trained) + learns_mlp)
    attention = _attention(shape, job, layout, own) + _head_norms(shape, layer, trained, factor) / own
    state = layer.state_bytes * c / 2
    if not layer.attends:
        attention, inputs = 0.0, c * hidden * learns_mlp
    experts = _experts(shape, job, layout, layer, trained=trained)
    feed, feed_outputs, working = _feed_forward(shape, job, layout, layer, experts, trained=trained)
    none = between + inputs + attention + state + feed + low
    # of the projections, the kernel, and o_proj
    outputs = 0.0
    if layer.attends:
        cut = layer.cut_by("attention", tp)  # of what is put together each rank keeps its part
        made = own_keys(shape, cut) + shape.heads * shape.head_dim / cut
        outputs = c * (made + shape.heads * shape.value_dim / own) + 4 * shape.heads / own
    selective = c * hidden * positions + outputs + c * hidden + feed_outputs + low
    share = _COMPILED_SHARE
    if trained:
        share = _COMPILED_SHARE_IN_FLOAT8 if job.float8 else _COMPILED_SHARE_OF_TRAINED
    # compiled or not, experts keep what is theirs, but for the activated gate, and so does what carries a state
    between_products = none - state - experts.none - (selective - experts.selective)
    compiled = selective - experts.selective + share * between_products + experts.compiled + state
    return Kept(none, selective, c * hidden * positions, compiled, working + 4 * hidden * positions)


def _learns(job: Job, layer: Layer, kind: str, *, trained: bool) -> bool:
    """Whether a matrix of some kind that takes hidden states is trained, or has an adapter."""
    takes_hidden = [w for w in layer.weights if w.kind == kind and w.linear and w.cut != 1 and not _is_down(w)]
    return any(trained or gets_adapter(job, weight) for weight in takes_hidden)


def own_keys(shape: ModelShape, ranks: int) -> float:
    """Numbers of the keys and values that a layer makes of a position on one of the ranks that share its heads."""
    return max(shape.kv_heads / ranks, 1) * (shape.head_dim + shape.value_dim)


def _attention(shape: ModelShape, job: Job, layout: Layout, ranks: int) -> float:
    """Queries, keys and values as the kernel takes them, its result, and 4 bytes a head.

    Args:
        ranks: that share the heads.
    """
    c = job.compute_bytes
    q, v = shape.heads * shape.head_dim / ranks, shape.heads * shape.value_dim / ranks
    result = c * v + 4 * shape.heads / ranks
    if layout.cp > 1 and job.keys_once:
        if layout.cp_method == "allgather":
            return c * (q + layout.cp * own_keys(shape, ranks)) + result
        return c * (q + own_keys(shape, ranks) + v) + result  # and the result as it was before it was sent back
    # with gathered keys, those of all positions before the ends of a rank's two chunks
    keys = layout.cp + 0.5 if layout.cp > 1 and layout.cp_method == "allgather" else 1.0
    same = shape.value_dim == shape.head_dim
    padded = 0 if same else 2 * q - v  # values as wide as keys, and the kernel's own result beside what is used of it
    together = v if layout.cp > 1 else 0  # the kernel's results, put together
    return c * (q + keys * (q + v) + padded + together) + result


def _norms(layer: Layer, hidden: int, trained: bool, factor: int) -> float:
    """Norms over hidden states: the input in fp32, one number a position, and for a trained weight its factor."""
    count = sum(1 for weight in layer.weights if weight.kind == "norm" and weight.shape == (hidden,))
    return count * (4 * hidden + 4 + (factor * hidden if trained else 0))


def _head_norms(shape: ModelShape, layer: Layer, trained: bool, factor: int) -> float:
    """Norms over each head's queries or keys."""
    total = 0.0
    for weight in layer.weights:
        if weight.kind == "norm" and weight.shape != (shape.hidden,):
            heads = shape.kv_heads if "k_" in weight.name else shape.heads
            numbers = heads * shape.head_dim if weight.numel <= shape.head_dim else weight.numel
            total += 4 * numbers + 4 * heads + (factor * numbers if trained else 0)
    return total


def _low_rank(job: Job, layer: Layer) -> float:
    """The thin results of adapters' inner matrices; whole positions on every tensor-parallel rank."""
    linear = sum(1 for weight in layer.weights if gets_adapter(job, weight) and len(weight.shape) == 2)
    return float(linear * job.lora_rank * job.compute_bytes)


def _low_rank_of_experts(shape: ModelShape, job: Job, layer: Layer) -> float:
    """The same of stacked experts, for each choice; as many as make 16 bytes at least (parallel/expert_adapters.py)."""
    stacked = sum(1 for weight in layer.weights if gets_adapter(job, weight) and len(weight.shape) == 3)
    return float(stacked * -(-job.lora_rank // 8) * 8 * job.compute_bytes * shape.experts_per_token)


def _copied_inputs(job: Job, layout: Layout, layer: Layer, hidden: int) -> float:
    """Where a backward pass has two parts, adapters run as PEFT has them: masters in fp32 have the input cast up, and
    autocast casts it down again, so each keeps a copy of its own. What `kept` counts once as the input of products is
    that copy; where attention keeps its result for itself as well, it is one more."""
    if not job.is_mixed or layout.shards > 1:  # FSDP gathers adapters in the compute dtype
        return 0.0
    adapted = [w for w in layer.weights if w.kind != "experts" and gets_adapter(job, w) and len(w.shape) == 2]
    copies = [w.shape[1] / (layout.tp if w.cut == 1 else 1) for w in adapted]
    counted = 0.0
    for kind in ("attention", "mlp"):
        takes_hidden = any(w.kind == kind and w.shape[1] == hidden and w.cut != 1 for w in adapted)
        counted += hidden if takes_hidden else 0
    counted += sum(size for w, size in zip(adapted, copies, strict=True) if _is_down(w))
    return job.compute_bytes * (sum(copies) - counted) + _low_rank(job, layer)


def _feed_forward(
    shape: ModelShape, job: Job, layout: Layout, layer: Layer, experts: _Experts, *, trained: bool
) -> tuple[float, float, float]:
    """MLP or experts: kept without recompute (its input aside), results of products, and working space."""
    c, hidden = job.compute_bytes, shape.hidden
    gates = 2 if shape.gated else 1
    width = _dense_width(layer)
    dense = width / layer.split_by("mlp", layout.tp)
    # the activated gate, or what is activated; and the input of the last product
    learns = any(_is_down(weight) and (trained or gets_adapter(job, weight)) for weight in layer.weights)
    none = c * dense * (gates + (1 if shape.gated else 0) + learns)
    outputs = c * (gates * width / layer.cut_by("mlp", layout.tp) + (hidden if dense else 0))
    working = 2 * c * dense
    return none + experts.none, outputs + experts.selective, working + experts.working


@dataclass(frozen=True, slots=True)
class _Experts:
    """Bytes of a position that a layer's experts keep: without recompute, the results of products alone, and where
    layers are compiled with them or around them; and what their backward pass needs besides."""

    none: float = 0.0
    selective: float = 0.0
    compiled: float = 0.0
    working: float = 0.0


def _experts(shape: ModelShape, job: Job, layout: Layout, layer: Layer, *, trained: bool) -> _Experts:
    if not layer.has_experts:
        return _Experts()
    c, chosen = job.compute_bytes, float(shape.experts_per_token)
    split = layout.tp if any(weight.kind == "experts" and weight.cut is not None for weight in layer.weights) else 1
    width = chosen * shape.expert_intermediate / split
    tokens = chosen * shape.hidden
    orders = (_CHOICE_BYTES + _SENT_BYTES if layout.ep > 1 else _CHOICE_BYTES) * chosen + 4 * shape.experts + 4
    low = _low_rank_of_experts(shape, job, layer)
    # inputs of products whose weights get a gradient, or an adapter: what is sorted by experts, and the gate times up
    inputs = tokens + width if trained or low else 0.0
    biased = any(weight.kind == "experts" and "bias" in weight.name for weight in layer.weights)
    # gate and up, and the activated gate; of gpt-oss's, which are clamped, its sigmoid, the product, up and one too
    gates = (6 if biased else 3) * width
    return _Experts(
        # and results before weighting
        none=c * (tokens + gates + inputs) + orders + low,
        # what biases are added to in place is computed again (parallel/recompute.py)
        selective=(0.0 if biased else c * (2 * width + tokens)) + c * shape.experts + low,
        compiled=c * (tokens + 2 * width + inputs) + orders + low,
        working=2 * c * (width + tokens),
    )


def _dense_width(layer: Layer) -> int:
    """Width of a layer's MLP, or of its shared experts; 0 without."""
    return sum(w.shape[1] for w in layer.weights if _is_down(w))


def _is_down(weight: Weight) -> bool:
    name = weight.name.removesuffix(".weight").rsplit(".", 1)[-1]
    return weight.kind == "mlp" and weight.linear and name in ("down_proj", "w2", "c_proj", "fc2", "dense_4h_to_h")
