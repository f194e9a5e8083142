"""What the backward pass computes again instead of finding it kept.

`full` keeps the input of each decoder layer and computes the layer again: the least memory, a third more work.
`selective` keeps the results of products and of attention as well, which are nearly all of the work, and computes
again what lies between them - norms, rotations, activations, dropout - which is about half of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
Remember = Callable[[], Callable[[], AbstractContextManager[object]]]
"""Called in the forward pass; what it returns makes contexts that put back what a layer read from outside."""


def all_of(*remember: Remember) -> Remember:
    """What remembers several things at once."""

    def now() -> Callable[[], AbstractContextManager[object]]:
        made = [each() for each in remember]

        @contextmanager
        def put_back() -> Iterator[None]:
            with ExitStack() as stack:
                for each in made:
                    stack.enter_context(each())
                yield

        return put_back

    return now


_KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "transformers::grouped_mm_fallback",
        "fourfold::documents",
        "fourfold::equal_documents",
        "fourfold::gated_delta_rule",
        "fourfold::low_rank",
    }
)
"""Operators whose results `selective` keeps; by name, since not every version has each of them.
"""


_THIN = 128
"""Inner size below which a grouped product is one of adapters: cheap, and its result as large as the experts' own."""
_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})


def settings(
    kind: Recompute, *, remember: Remember | None = None, random: bool = True, grouped_biases: bool = False
) -> dict[str, Any]:
    """What `torch.utils.checkpoint.checkpoint` is told for each layer.

    Args:
        kind: selective or full.
        remember: for what a layer reads besides its arguments.
        random: whether layers draw from torch's generators, whose states must then be kept too (on a GPU a wait for
            the device in each layer).
        grouped_biases: whether experts have biases, which are added to the results of their products in place; what
            was changed cannot be handed out, so selective computes these products again.
    """
    kept = (_KEPT - _GROUPED if grouped_biases else _KEPT) if kind == "selective" else None
    context_fn = partial(_contexts, kept, remember)
    return {"use_reentrant": False, "preserve_rng_state": random, "context_fn": context_fn}


def _contexts(
    kept: frozenset[str] | None, remember: Remember | None
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The contexts of a layer's forward pass and of its second computation."""
    forward, again = nullcontext(), nullcontext()
    if kept is not None:
        forward, again = create_selective_checkpoint_contexts(partial(_policy, kept))
    return forward, again if remember is None else _Again(remember(), again)


class _Again(AbstractContextManager[None]):
    """Where a layer is computed again: once, or twice where gradients of inputs and weights are made apart (zbv)."""

    def __init__(self, remembered: Callable[[], AbstractContextManager[object]], inner: AbstractContextManager[object]):
        self._remembered, self._inner = remembered, inner
        self._entered = ExitStack()

    def __enter__(self) -> None:
        self._entered.enter_context(self._remembered())
        self._entered.enter_context(self._inner)

    def __exit__(self, *error: object) -> None:
        self._entered.close()


def _policy(kept: frozenset[str], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    keep = name in kept and not (name in _GROUPED and args[0].shape[-1] < _THIN)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
