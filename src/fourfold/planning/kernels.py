"""How long one rank computes on a layer, on the head and on an optimizer step; nothing of what ranks send.

A kernel is limited by the products that it makes, by the device's memory, or by the host that launches it. Products are
timed one by one by the device's curve. What lies between them - norms, rotations, activations, residuals, casts -
reads and writes memory and does little else, so it is counted in bytes for each number of an activation, operation by
operation, as Transformers' layers and torch's autograd do it in eager mode.

Shape legend: H hidden size, T tokens of a micro-batch on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fourfold.planning.device import Device
from fourfold.planning.engines import EAGER, Engine, has_flash, has_own_attention
from fourfold.planning.flops import (
    FLASH_BACKWARD,
    NEEDED_BACKWARD,
    Mode,
    Product,
    attention_flops,
    layer_products,
    num_regions,
    weight_groups,
)
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.shape import Layer, ModelShape, Weight

PRODUCT_SHARE = 0.94
"""Of the speed that a product has alone, what it has within a step, where the card is hot and caches are cold.
Fitted to the H200 runs of a Llama-3.2-3B shape (full) and a Llama-3-8B shape (LoRA), eager and compiled."""
MEMORY_SHARE = 0.7
"""Of the peak of device memory, what kernels between products attain. Fitted to the same runs; a plain copy attains
0.9 on that card."""
FLASH_SHARE = 0.6
FLASH_MOST = 315e12
"""Of the dense peak, what flash attention 2 attains, and the most on any card: 0.5 to 0.73 of an A100, 335 TFLOP/s
on an H100, whose newer instructions it does not use (arXiv:2307.08691, section 4); torch's attains 240 there over
4,096 positions and some 330 over 30,000."""
FLASH_NARROW, NARROW_HEAD = 0.82, 64
"""The same for heads of at most so many numbers, of which a block holds less work (H100: 273 to 285 TFLOP/s)."""
GROUPED_TOGETHER = 8
"""Experts whose products fill the card at one time in a grouped product: one of 512 tokens has some 50 tiles of
128 x 128, and three to eight of them make up for the waves of 132 multiprocessors."""

# Bytes read and written for each number in 16 bits, (forward, backward), by operation:
NORM_BYTES = (36.0, 72.0)
"""RMS norm that goes to fp32 and back: cast 6, square 8, mean 4, scale 8, cast 6, weight 4; back 2.0 times as much."""
RESIDUAL_BYTES = (6.0, 6.0)
"""The sum of the layer's input and a region's output; back: two gradients of one input are added."""
FAN_OUT_BYTES = 6.0
"""Backward: adding up the gradients of an input that several products share, for each beyond the first."""
ROTARY_BYTES = (20.0, 28.0)
"""Of queries and keys: two products 4 + 4, half turned 2 + 4, their sum 6; back with slices that are filled up."""
ATTENTION_BYTES = (20.0, 20.0)
"""For each number of the queries: keys and values repeated for grouped heads 4, all three laid end to end 12, the
output brought into order 4."""
GATE_BYTES = (10.0, 18.0)
"""Activation 4 and product with the gate 6; back 6 and 12."""
ACTIVATION_BYTES = (4.0, 6.0)
"""Without a gate."""
ROUTE_BYTES = (5.0, 7.6)
"""For each number of a chosen expert's input, by kernels that no compiler joins with others (parallel/rows_kernel.py):
gathered and added up; back weighted and multiplied with the result, and added up. 165 + 110 and 324 + 110 us for 65,536
rows of 2,048 numbers on an H100."""
SENT_BYTES = (7.0, 7.0)
"""The same where rows come from other ranks: put in the order of experts, and back; 187 to 230 us each."""
ADAPTER_BYTES = ((2.0, 4.0), (6.0, 4.0))
"""Of an adapter, for each input and each output number: forward the thin product reads the input, and the other one is
added to the output; backward the input is read and its gradient added to, the output's gradient read twice
(models/lora.py)."""
STACKED_ADAPTER_BYTES = ((2.0, 8.0), (10.0, 4.0))
"""The same of an adapter of stacked experts, for each row: the term is written, and added in a pass of its own; so is
its gradient (parallel/expert_adapters.py)."""
ADAPTER_TOKEN_S = (5e-9, 9e-9)
"""For each token and adapter, what the thin products cost beside bytes: of the card's multiprocessors they keep half
busy. H100, rank 8, 8,192 tokens: 130 to 220 us an adapter were missing without it."""
STATE_PASSES = (13.0, 39.0)
"""How often a layer that carries a state reads or writes, forward and backward, what it keeps of a position: gated
delta nets by base/delta_rule.py, 380 ms of a step of 890 (Qwen3.5-9B shape, LoRA, two rows of 4,096 on an H200). Other
kinds of states are taken for alike."""
SCORE_BYTES = 36.0
"""For each score, where attention is not fused (soft caps and sinks without a kernel for them): product 2, scale 4,
cast 6, mask 8, softmax 8, cast 6, product 2. Backward as the products: twice as much."""
LOGIT_BYTES = (14.0, 22.0)
"""Cast to fp32 6, log-softmax 8; back zeros 4, softmax 12, a cast 6 (the product's own 2 are with the product)."""
COMPILED_LOGIT_BYTES = (3.7, 4.8)
"""The same of the compiled loss, which reads 2, and reads and writes 2: at the card's pace for plain passes what 1.51
and 1.93 ms for 8,192 x 128,256 logits stand for (H100)."""

CONTEXT_ATTENTION_SPEED = 1.2
"""Of attention over gathered keys or with a part of the heads, by kernels of our own: Llama-3-8B, LoRA, one row of
65,536 over 4 H100, 6.08 to 5.42 s."""

FLOAT8_BYTES = 5.0
"""For each number of an operand that is cast: read for the largest magnitude, unless that comes with its making, read
for the cast, which writes both layouts, 1 each; siblings share their input."""
STREAM_SHARE = 0.85
"""Of the peak of device memory, what single passes over large tensors attain: AdamW takes 9.6 ps a number in fp32 and
5.0 in bf16, the norm 1.6 and 1.0, on an H100."""

KERNEL_S = 3.5e-6
"""Of each kernel, the time in which it begins and ends and the card is not full. From the H200 run of 1,190 tokens a
step as one CUDA graph, where the host does not count: 0.108 s, 7,200 kernels, 0.082 s without this term."""

KERNELS = {"norm": 7, "rotary": 12, "attention": 10, "residual": 1, "mlp": 2, "experts": 25, "product": 1, "adapter": 4}
"""Kernels of the forward pass; counted as the bytes are. A backward pass has twice as many."""

UNPACK_BYTES = 2.1
"""For each 4-bit weight that is unpacked for a product: half a byte read, two written; 0.92 ps a weight on an H100
(parallel/unpack_kernel.py; bitsandbytes' own kernels: 1.36)."""


# What the host does besides, in kernels of the forward pass, from the same runs:
HOST_ADAPTER = 8
"""Of an adapter: its kernels, and a function of Python's around them."""
HOST_UNPACK = 4.5
"""Of a packed weight."""
HOST_CAST = 1.9
"""Of a trained matrix that autocast copies to the compute dtype."""
HOST_CHECKPOINT = 120
"""Of a layer that is computed again: saving and restoring, once in the backward pass."""
HOST_SELECTIVE = 270
"""Of a layer under selective recompute, where Python sees every operator, once in all."""
HOST_SELECTIVE_EXPERTS = 540
"""The same of a layer with experts, which has twice as many operators: 2,330 against 1,239, forward and backward, as
rehearsals of Qwen3-30B-A3B and Llama-3-8B count them."""
HOST_PACKED_AGAIN = 10
"""Of a packed weight in a layer that is computed again, once in the backward pass: the tensors that it consists of pass
the hooks of checkpointing; 29 small operators, as found on a CPU beside plain weights."""
HOST_EXPERTS = 57
"""Of a layer's experts: choosing, sorting and merging."""
HOST_EXCHANGE = 12
"""Of experts that ranks share: counts, sorting and three exchanges; 171 operators more in all passes, counted alike."""
HOST_STACKED_ADAPTER = 12
"""More of an adapter of stacked experts where they are not compiled: its matrices are scaled and laid out anew."""
HOST_WAIT = (300.0, 195.0)
"""In small operators, forward and backward, of a layer whose experts ranks share: once the counts are there, the device
waits until the host has given it what follows, and ranks wait for the slowest of them in each exchange. Full tuning of
the same on a host of 8.7 us: layers took 8.0 and 10.3 ms, of which 5.4 and 8.6 are explained otherwise."""
HOST_REGION = 16
"""Of a region that tensor-parallel ranks share: two hooks and collectives, 14 operators each with their gradients. On 4
H100 a collective of 1 KiB takes 39 us, five small operators of that host, whatever the hops; a function of Python's
around it takes as much as an adapter's."""
HOST_PEFT_ADAPTER = 13
"""More of an adapter where a backward pass has two parts, since it runs as PEFT has it: 1.87 times the operators in a
layer of seven, forward and backward, counted in rehearsals of Llama-3-8B under zbv and 1f1b."""
HOST_GROUP, HOST_GROUP_LAYER = 15.0, 10.0
"""In small operators, of each group of weights whose gradients are made apart (`flops.weight_groups`): a call of
autograd's own, for which the graph is walked down to the stage's first layer, so that each layer of the stage counts.
Timed on a CPU for stages of 1, 2, 4, 8 and 16 layers, of 14 groups (LoRA): 22, 27, 60, 88 and 170."""
HOST_HEAD = 85
"""Of loss and batch, for a micro-batch."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time of one layer for one micro-batch.

    Attributes:
        forward: of the forward pass.
        backward: of both gradients, with what is computed again.
        weight_grad: of it, the gradients of weights alone, which zero bubble puts off.
        device, host: of both passes, what the device computes and what the host takes to give it, apart.
    """

    forward: float
    backward: float
    weight_grad: float
    device: float = 0.0
    host: float = 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """What of a layout one rank's layer depends on.

    Attributes:
        tokens: positions of a micro-batch on a rank: of the micro-batch, divided by cp.
        tp, ep: ranks.
        sequence_parallel: whether positions are shared between regions.
        splits_backward: whether what is recomputed is so for each group of weights as well (zbv).
        walked: there, small operators that the host spends on each group of a layer's weights.
        context: how positions are shared; None where they are not.
    """

    tokens: float
    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = True
    splits_backward: bool = False
    walked: float = 0.0
    context: str | None = None

    @classmethod
    def of(cls, layout: Layout, tokens: float, walked: float = 0.0) -> Place:
        """The place of a rank of a layout."""
        context = layout.cp_method if layout.cp > 1 else None
        return cls(tokens, layout.tp, layout.ep, layout.sequence_parallel, layout.splits_backward, walked, context)


def memory_seconds(device: Device, num_bytes: float) -> float:
    """Time of kernels that read and write so many bytes of the device's memory."""
    return num_bytes / (device.hbm_bytes_per_s * MEMORY_SHARE)


def stream_seconds(device: Device, num_bytes: float) -> float:
    """The same of single passes over large tensors."""
    return num_bytes / (device.hbm_bytes_per_s * STREAM_SHARE)


def product_seconds(device: Device, product: Product, tokens: float, dtype: str, number_bytes: int) -> float:
    """Time of one product for so many tokens: of its operations or its bytes, whichever is longer.

    Each of the two gradients takes as long: the same three matrices are read or written in other roles.
    """
    flops = product.flops * tokens
    together = min(product.groups, GROUPED_TOGETHER)
    one = flops / product.groups * together
    seconds = flops / (device.peak(dtype) * device.matmul_efficiency(one, dtype) * PRODUCT_SHARE)
    inputs = (product.rows + product.columns) * product.rows_of_token * tokens
    return max(seconds, memory_seconds(device, (product.numel + inputs) * number_bytes))


def attention_seconds(device: Device, flops: float, dtype: str, head_dim: int) -> float:
    """Time of fused attention of so many operations."""
    narrow = FLASH_NARROW if head_dim <= NARROW_HEAD else 1.0
    return flops / (min(FLASH_SHARE * device.peak(dtype), FLASH_MOST) * narrow)


@lru_cache(maxsize=4096)
def layer_seconds(
    shape: ModelShape,
    kind: int,
    mode: Mode,
    job: Job,
    place: Place,
    recompute: Recompute,
    device: Device,
    engine: Engine,
) -> Seconds:
    """Time of one layer for one micro-batch on one rank.

    Args:
        kind: which of `shape.kinds`.
    """
    layer = shape.kinds[kind]
    products = layer_products(shape, kind, job, place.tp, place.ep)
    shape = shape.of_layer(layer)
    linear = engine.linear or ("fp8" if job.float8 and mode != "frozen" else job.compute)
    of_products = [
        product_seconds(device, each, place.tokens, linear if each.groups == 1 else job.compute, job.compute_bytes)
        for each in products
    ]
    product = sum(of_products)
    heads = shape.heads / layer.split_by("attention", place.tp)
    between = _between(shape, layer, job, place, heads, products, engine)
    width = job.compute_bytes / 2 * place.tokens
    states = (passes * layer.state_bytes for passes in STATE_PASSES)
    around = [memory_seconds(device, (each + state) * width) for each, state in zip(between, states, strict=True)]
    attention, fused = _attention(shape, layer, job, place, heads, device)
    if has_own_attention(device):
        attention /= _attention_speed(engine, job, place)
    unpack = memory_seconds(device, UNPACK_BYTES * sum(each.numel for each in products if each.packed))
    adapters = place.tokens * sum(each.adapter > 0 for each in products) * engine.adapters
    casts = _float8_casts(products, job, place, device) if linear == "fp8" else (0.0, 0.0)
    ends = _num_kernels(layer, products, engine) * KERNEL_S
    op_s = engine.launch_ops * device.host_op_s
    launch = _host_kernels(layer, products, job, mode, engine, place) * op_s
    forward = product + attention + around[0] + unpack + ends + adapters * ADAPTER_TOKEN_S[0] + casts[0]
    waits, waits_back = (ops * device.host_op_s if layer.has_experts and place.ep > 1 else 0.0 for ops in HOST_WAIT)
    if mode == "frozen":
        return Seconds(max(forward, launch) + waits, 0.0, 0.0, forward + waits, launch + waits)
    weight_grad = product if mode == "trained" else 0.0
    backward = (
        product
        + weight_grad
        + around[1]
        + unpack
        + attention * (FLASH_BACKWARD if fused else NEEDED_BACKWARD)
        + 2 * ends
        + adapters * ADAPTER_TOKEN_S[1]
        + casts[1]
    )
    again, launch_again = 0.0, 0.0
    if recompute != "none":
        seen = HOST_SELECTIVE_EXPERTS if layer.has_experts else HOST_SELECTIVE
        host = HOST_CHECKPOINT if recompute == "full" else seen
        host += HOST_PACKED_AGAIN * sum(each.packed for each in products)
        again = forward if recompute == "full" else around[0] + ends
        again -= of_products[-1] if recompute == "full" and not engine.repeats_last else 0.0
        launch_again = launch + host * op_s
    waits_back += waits if recompute != "none" else 0.0
    groups = weight_groups(layer, job, mode) if place.splits_backward else 0
    launch_back = 2 * launch + (1 + groups) * launch_again + groups * place.walked * device.host_op_s
    computed = backward + (1 + groups) * again
    waited = waits + waits_back
    return Seconds(
        max(forward, launch) + waits,
        max(computed, launch_back) + waits_back,
        weight_grad,
        device=forward + computed + waited,
        host=launch + launch_back + waited,
    )


def _attention_speed(engine: Engine, job: Job, place: Place) -> float:
    """How much faster attention is than PyTorch's own."""
    if place.context is None:
        return engine.attention_speed(job.sequence)
    return 1.0 if place.context == "ring" else CONTEXT_ATTENTION_SPEED


def _is_fused(shape: ModelShape, layer: Layer, job: Job, device: Device) -> bool:
    """Whether a kernel makes scores and never writes them; in fp32 none knows soft caps or sinks."""
    has_sinks = any("sinks" in weight.name for weight in layer.weights)
    if job.compute == "fp32":
        return not (shape.caps_scores or has_sinks)
    return has_own_attention(device) if shape.caps_scores else has_flash(device) or not has_sinks


def _attention(
    shape: ModelShape, layer: Layer, job: Job, place: Place, heads: float, device: Device
) -> tuple[float, bool]:
    """Time of scores and values forward, and whether a fused kernel makes them."""
    if _is_fused(shape, layer, job, device):
        flops = attention_flops(shape, layer, job.sequence, heads) * place.tokens
        return attention_seconds(device, flops, job.compute, shape.head_dim), True
    # every score is made, also of keys that the mask hides
    scores = heads * job.sequence * place.tokens
    products = 2.0 * scores * (shape.head_dim + shape.value_dim) / (FLASH_SHARE * device.peak(job.compute))
    return products + memory_seconds(device, scores * SCORE_BYTES * job.compute_bytes / 2), False


def _between(
    shape: ModelShape,
    layer: Layer,
    job: Job,
    place: Place,
    heads: float,
    products: tuple[Product, ...],
    engine: Engine,
) -> tuple[float, float]:
    """Bytes of a token between products, forward and backward, numbers of 16 bits."""
    shared = place.tp if place.sequence_parallel else 1
    hidden = shape.hidden / shared
    queries = heads * shape.head_dim
    keys = min(queries, queries * max(shape.kv_heads, layer.split_by("attention", place.tp)) / shape.heads)
    inner = _inner_width(shape, layer, place)
    chosen = max((each.rows_of_token for each in products if each.groups > 1), default=0.0)
    total = [0.0, 0.0]
    parts = (
        (NORM_BYTES, _norm_width(shape, layer, hidden, queries, keys)),
        (RESIDUAL_BYTES, 2 * hidden),
        (ROTARY_BYTES, queries + keys),
        (ATTENTION_BYTES, queries),
        (GATE_BYTES if shape.gated else ACTIVATION_BYTES, inner),
        ((0.0, FAN_OUT_BYTES), 3 * shape.hidden),
    )
    for (forward, backward), numbers in parts:
        total[0] += engine.traffic * forward * numbers
        total[1] += engine.traffic * backward * numbers
    for routes in (ROUTE_BYTES, *([SENT_BYTES] if place.ep > 1 else [])):
        for direction in range(2):
            total[direction] += routes[direction] * chosen * shape.hidden
    for each in products:
        if each.adapter:
            for direction in range(2):
                stacked = each.groups > 1
                # compiled with the experts, a pass of its own is part of the one before or behind it
                apart = stacked and engine.leaves_experts
                of_input, of_output = (STACKED_ADAPTER_BYTES if apart else ADAPTER_BYTES)[direction]
                share = each.rows_of_token if stacked else engine.adapters
                total[direction] += (of_input * each.columns + of_output * each.rows) * share
    return total[0], total[1]


def _float8_casts(products: tuple[Product, ...], job: Job, place: Place, device: Device) -> tuple[float, float]:
    """Time of casts to float8 around the products of a layer, forward and backward (models/float8.py)."""
    plain = [each for each in products if each.groups == 1]
    numbers = sum(each.numel for each in plain)
    inputs, outputs = (place.tokens * sum(sizes) for sizes in zip(*((p.columns, p.rows) for p in plain), strict=True))
    # the largest magnitude of a master, then the cast; backward only the cast, laid out anew
    forward = numbers * (2 * job.master_bytes + 1) + inputs * FLOAT8_BYTES
    backward = numbers * (job.master_bytes + 1) + outputs * FLOAT8_BYTES
    return stream_seconds(device, forward), stream_seconds(device, backward)


def _inner_width(shape: ModelShape, layer: Layer, place: Place) -> float:
    """Numbers of a token between a region's projections up and down, on this rank, all its chosen experts together."""
    width = 0.0
    for weight in layer.weights:
        if weight.kind in ("mlp", "experts") and weight.is_matrix:
            share = shape.experts_per_token / shape.experts if weight.kind == "experts" else 1.0
            width += share * weight.numel / layer.split_by(weight.kind, place.tp)
    return width / (shape.hidden * (3 if shape.gated else 2))


def _norm_width(shape: ModelShape, layer: Layer, hidden: float, queries: float, keys: float) -> float:
    """Numbers of a token that go through norms in a layer."""
    width = 0.0
    for weight in layer.weights:
        if not _is_norm(weight):
            continue
        if weight.numel == shape.hidden:
            width += hidden
        elif weight.numel == shape.head_dim:
            width += keys if "k_norm" in weight.name else queries
        else:
            width += weight.numel
    return width


def _is_norm(weight: Weight) -> bool:
    return weight.kind == "norm" and not weight.name.endswith("bias")


def _num_kernels(layer: Layer, products: tuple[Product, ...], engine: Engine) -> float:
    """Of a forward pass; fusion leaves products as they are."""
    norms = sum(_is_norm(weight) for weight in layer.weights)
    adapters = sum(each.adapter > 0 for each in products)
    between = norms * KERNELS["norm"] + KERNELS["rotary"] + KERNELS["attention"] + 2 * KERNELS["residual"]
    between += KERNELS["experts"] if layer.has_experts else KERNELS["mlp"]
    return between * engine.kernels + len(products) * KERNELS["product"] + adapters * KERNELS["adapter"]


def _host_kernels(
    layer: Layer, products: tuple[Product, ...], job: Job, mode: Mode, engine: Engine, place: Place
) -> float:
    """Of a forward pass, as the host counts them."""
    found = _num_kernels(layer, products, engine) + (HOST_EXPERTS if layer.has_experts else 0)
    found += HOST_EXCHANGE if layer.has_experts and place.ep > 1 else 0
    # compiled, collectives are kernels among others
    found += HOST_REGION * engine.kernels * num_regions(layer) if place.tp > 1 else 0
    for each in products:
        if each.adapter:
            found += HOST_ADAPTER - KERNELS["adapter"] + (HOST_PEFT_ADAPTER if place.splits_backward else 0)
            found += HOST_STACKED_ADAPTER if each.groups > 1 and engine.leaves_experts else 0
        if each.packed:
            found += HOST_UNPACK
        elif mode == "trained" and job.is_mixed:
            found += HOST_CAST * engine.kernels
    return found


def head_seconds(
    shape: ModelShape, job: Job, tokens: float, tp: int, device: Device, *, shares_loss: bool = False
) -> Seconds:
    """Logits, loss and their gradients for so many positions of a micro-batch.

    Under a frozen head the gradient is made with the logits, in the forward pass; under a trained one logits of more
    than one chunk are made again (parallel/loss.py), unless they are kept.

    Args:
        shares_loss: tp ranks share its vocabulary, and it is not compiled.
    """
    if not job.trained_share:
        return Seconds(0.0, 0.0, 0.0)
    positions = tokens * job.trained_share
    chunk = min(positions, job.chunk)
    product = Product(-(-shape.vocab // tp), shape.hidden)
    one = product_seconds(device, product, chunk, job.compute, job.compute_bytes) * positions / max(chunk, 1.0)
    moved = LOGIT_BYTES if job.engine == "eager" or shares_loss else COMPILED_LOGIT_BYTES
    forward, backward = (memory_seconds(device, each * positions * product.rows) for each in moved)
    forward += HOST_HEAD * EAGER.launch_ops * device.host_op_s  # counted once: the host waits for nothing here
    if job.tuning != "full":
        return Seconds(2 * one + forward + backward, 0.0, 0.0)
    again = one + forward if positions > job.chunk and not job.keeps_logits else 0.0
    return Seconds(one + forward, 2 * one + backward + again, one)
