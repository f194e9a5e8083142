"""What a workload costs at the least: parameters and floating-point operations of a shape, and the time they take.

A token's forward pass takes 2 FLOP for each weight of a matrix that it goes through, and 2 x layers x width x length
for causal attention (each position sees half of the sequence on average), where the width is that of all heads. A
backward pass takes once more for the inputs' gradient and once more for that of weights that are trained; attention's
backward takes twice its forward. The embedding is a look-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRODUCTS_PER_S = 800e12
"""FLOP/s of a bf16 8192^3 product, as measured on an H200."""
PEAK_PER_S = 989e12
"""FLOP/s in bf16 that an H100 or H200 is sold with; what MFU is counted against."""


@dataclass(frozen=True)
class Cost:
    """How often each weight, and each position of attention, is computed with.

    Attributes:
        weights: FLOP of a token for a weight.
        attention: FLOP of a token over layers x width x length.
    """

    weights: int
    attention: int


FULL = Cost(6, 6)
FULL_RECOMPUTED = Cost(8, 8)
LORA = Cost(4, 6)
LORA_RECOMPUTED = Cost(6, 8)
LORA_PAIRS = Cost(6, 8)
"""LoRA with a second forward pass, that of the reference model."""


@dataclass(frozen=True)
class Shape:
    """What counting takes of a model's config.

    Attributes:
        parameters: of the whole model.
        active: of the matrices that a token goes through; of the experts those that it is sent to.
        attention_width: layers x heads x head dim; of layers that see a short window only, nothing.
        hidden_width: layers x hidden size.
    """

    parameters: int
    active: int
    attention_width: int
    hidden_width: int


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Count the parameters of a config.json of llama's, qwen3_moe's or gpt_oss's kind, whose biases are left out."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    attention = 2 * hidden * queries + 2 * hidden * keys
    vectors = 2 * hidden  # the two norms of a layer
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        expert = 3 * hidden * config.get("moe_intermediate_size", config["intermediate_size"])
        router = hidden * experts
        mlp = router + experts * expert
        used = router + config["num_experts_per_tok"] * expert
        vectors += 2 * head if "num_experts" in config else 0  # the norms of queries and keys
    else:
        mlp = used = 3 * hidden * config["intermediate_size"]
    whole = sum(kind != "sliding_attention" for kind in config.get("layer_types") or ["full_attention"] * layers)
    vocabulary = config["vocab_size"] * hidden
    tables = 1 if config["tie_word_embeddings"] else 2
    return Shape(
        parameters=layers * (attention + mlp + vectors) + tables * vocabulary + hidden,
        active=layers * (attention + used) + vocabulary,
        attention_width=whole * queries,
        hidden_width=layers * hidden,
    )


def flop_per_token(shape: Shape, cost: Cost, length: float) -> float:
    """FLOP that a token of documents of a length takes in a step."""
    return cost.weights * shape.active + cost.attention * shape.attention_width * length


def floor_tokens_per_sec(shape: Shape, cost: Cost, length: float) -> float:
    """Tokens in a second if all FLOP ran at the rate of large products."""
    return PRODUCTS_PER_S / flop_per_token(shape, cost, length)


def mfu(shape: Shape, length: int, tokens_per_sec: float) -> float:
    """Share (0 to 1) of the peak that full training uses, with 6N + 6 x layers x hidden x length FLOP a token."""
    return (6 * shape.parameters + 6 * shape.hidden_width * length) * tokens_per_sec / PEAK_PER_S
