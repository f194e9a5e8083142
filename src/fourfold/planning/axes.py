"""THE table of mesh axes: their order, what each divides, and what must be divisible.

The order is the order of ranks: the last axis varies fastest, so its ranks are neighbours. Tensor-parallel ranks
exchange activations in every layer and must be neighbours on the fastest link; pipeline stages send the least and
come first, across nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fourfold.planning.layout import Layout
from fourfold.planning.stages import check_stages


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What of a model the axes divide.

    Attributes:
        layers: decoder layers.
        heads, kv_heads: attention heads.
        intermediate: width of the gated MLP.
        experts: routed experts, 0 for a dense model.
    """

    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh.

    Attributes:
        name: as in the config (`parallel.<name>`).
        divides: what its ranks share, for people.
        collectives: what they send each other.
        rule: problems of a size with a model, as messages.
    """

    name: str
    divides: str
    collectives: str
    rule: Callable[[int, ModelFacts], Iterator[str]]


def _any_size(size: int, facts: ModelFacts) -> Iterator[str]:
    yield from ()


def _tensor_rule(size: int, facts: ModelFacts) -> Iterator[str]:
    """One message with all that keeps a size from being used, and the sizes that nothing keeps."""
    reasons = list(_tensor_reasons(size, facts))
    if reasons:
        fitting = [str(n) for n in range(1, facts.heads + 1) if not any(_tensor_reasons(n, facts))]
        yield f"parallel.tp: {size} {', and '.join(reasons)}. Use {_either(fitting)}."


def _tensor_reasons(size: int, facts: ModelFacts) -> Iterator[str]:
    shared = {"num_attention_heads": facts.heads, "intermediate_size": facts.intermediate}
    undivided = [f"{name} ({total})" for name, total in shared.items() if total % size]
    if undivided:
        yield f"does not divide {_either(undivided)}"
    if facts.kv_heads % size and size % facts.kv_heads:
        yield f"neither divides num_key_value_heads ({facts.kv_heads}) nor is a multiple of it"


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _expert_rule(size: int, facts: ModelFacts) -> Iterator[str]:
    if size > 1 and not facts.experts:
        yield f"parallel.ep: {size} needs a mixture of experts, and this model is dense. Use parallel.ep: 1."


def _expert_ranks_rule(layout: Layout, facts: ModelFacts) -> Iterator[str]:
    """`ep` must divide both the experts and the ranks that it regroups."""
    size, ranks = layout.ep, layout.dp_shard * layout.cp
    if size == 1 or not facts.experts:
        return
    if ranks == 1:
        yield (
            f"parallel.ep: {size} regroups the ranks of dp_shard x cp, and those are 1. Use strategy: fsdp "
            f"(or parallel.dp_shard: {size}); replicas of dp_replicate hold all experts."
        )
    elif ranks % size or facts.experts % size:
        of = math.gcd(ranks, facts.experts)
        valid = [str(n) for n in range(1, of + 1) if of % n == 0]
        sizes = _either(valid) if len(valid) > 1 else f"1, or other sizes than {ranks}"
        yield (
            f"parallel.ep: {size} does not divide both the {facts.experts} experts and the {ranks} ranks of "
            f"dp_shard x cp. Use {sizes}."
        )


def _context_rule(layout: Layout, facts: ModelFacts) -> Iterator[str]:
    """Ulysses exchanges positions for heads, of which tensor parallelism has left a rank only some."""
    heads = facts.heads // layout.tp
    if layout.cp > 1 and layout.cp_method == "ulysses" and heads % layout.cp:
        valid = [str(n) for n in range(2, heads + 1) if heads % n == 0]
        sizes = f"parallel.cp: {' or '.join(valid)}, or " if valid else ""
        yield (
            f"parallel.cp: {layout.cp} ranks cannot share {heads} attention heads evenly (cp_method: ulysses, tp: "
            f"{layout.tp}). Use {sizes}cp_method: allgather."
        )


AXES: tuple[Axis, ...] = (
    Axis("pp", "layers", "activations between neighbouring stages", _any_size),
    Axis("dp_replicate", "samples; weights are whole on each rank", "an all-reduce of gradients a step", _any_size),
    Axis(
        "dp_shard",
        "samples; weights, gradients and optimizer state are cut into as many parts",
        "an all-gather of weights a layer, a reduce-scatter of gradients",
        _any_size,
    ),
    Axis("cp", "the positions of a sequence", "keys and values in every layer", _any_size),
    Axis("tp", "every matrix, heads and vocabulary", "activations, twice in every layer", _tensor_rule),
)
"""Outermost first; `ep` is no axis of its own: it regroups the ranks of dp_shard."""

EXPERT_AXIS = Axis("ep", "the experts", "tokens to their experts and back, twice in every layer", _expert_rule)


def check_layout(layout: Layout, facts: ModelFacts) -> list[str]:
    """Every problem of a layout with a model, one message each, with the sizes that would work."""
    sizes = layout.sizes()
    axes = (*AXES, EXPERT_AXIS)
    problems = [problem for axis in axes if sizes[axis.name] > 1 for problem in axis.rule(sizes[axis.name], facts)]
    return [
        *problems,
        *_expert_ranks_rule(layout, facts),
        *_context_rule(layout, facts),
        *check_stages(layout, facts.layers),
    ]
