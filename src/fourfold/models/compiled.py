"""Decoder layers compiled by torch.compile: fewer passes over memory, and little left for the host to do.

All layers of a kind share what was compiled, for all numbers of tokens: it is compiled twice, for the first layer,
whose input has no gradient, and for the others. Training runs it, and what a step asks its model before it trains
(compiled once more); evaluation and generation run the layers as they are.

The compiler keeps the results of products and of attention for the backward pass and computes what lies between them
again, as `selective` recompute does, without its cost. Told to keep a layer's inputs alone, it computes again what the
backward pass reads and no more: not the layer's last product, a quarter of a llama's layer.

Of a layer with parts that it cannot have, as experts or positions that ranks share, what carries a state along a row,
or routers whose results are collected for the loss, it compiles what lies around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from fourfold.base.inductor import teach_inductor
from fourfold.base.log import get_logger
from fourfold.models.attention import keep_from_compiler
from fourfold.models.document_rows import MixerForward
from fourfold.parallel.recompute import Remember

log = get_logger(__name__)

Backend = str | Callable[..., Any]
"""What torch.compile takes: a name, or what compiles a graph."""

_MOST_VARIANTS = 64
"""Kinds of layers and of inputs that may be compiled; torch gives up after 8 by itself."""

_WRAPS_ALONE = frozenset(("transformers.modeling_layers", "transformers.utils.deprecation"))
"""Modules whose wrappers of a layer's forward pass do nothing in training: see `_unwrapped`."""


def _nothing() -> Callable[[], AbstractContextManager[None]]:
    """Layers read nothing but their inputs."""
    return nullcontext


@dataclass
class Compiled:
    """What the compiled layers of a model share.

    Attributes:
        is_asked: they are compiled without gradients, too.
        trains_plain, asks_plain: they could not be compiled with gradients, or without, and run so as they are.
    """

    is_asked: bool = False
    trains_plain: bool = False
    asks_plain: bool = False

    @property
    def runs_plain(self) -> bool:
        """Whether they run as they are now."""
        return self.trains_plain if torch.is_grad_enabled() else self.asks_plain or not self.is_asked

    def give_up(self) -> None:
        """Run them as they are from now on: with gradients, or without, as it is now."""
        if torch.is_grad_enabled():
            self.trains_plain = True
        else:
            self.asks_plain = True

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Within it the model is asked as often as it is trained, so that compiling pays."""
        self.is_asked = True
        try:
            yield
        finally:
            self.is_asked = False


class CompiledForward:
    """Stands in for a layer's `forward`: compiled where it is trained.

    Args:
        shared: the same for all layers of a model.
        own: what is compiled, if it is not the layer's `forward`.
        whole: nothing is left out, and it is an error if something would be.
    """

    def __init__(
        self,
        layer: nn.Module,
        shared: Compiled,
        backend: Backend,
        *,
        own: Callable[..., Any] | None = None,
        whole: bool = True,
    ) -> None:
        self._layer, self._shared, self._backend = layer, shared, backend
        self._own: Callable[..., Any] = layer.forward if own is None else own
        self._whole = whole
        # they take a second to import, and few runs on a CPU need them
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self._errors = (TorchDynamoException, FailOnRecompileLimitHit)
        self._remember: Remember | None = None
        self._compiled = self._compile(backend)

    def recompute(self, remember: Remember = _nothing) -> None:
        """Keep the layer's inputs alone for the backward pass, and compute it again there.

        Args:
            remember: for what it reads besides them, where it is not compiled as a whole.
        """
        self._remember = remember
        if self._whole:
            self._compiled = self._compile(_keeping_inputs(self._backend))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        is_tried_out = torch.is_grad_enabled() and not self._layer.training
        return (self._own if is_tried_out else self._run)(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._shared.runs_plain:
            return self._plain(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs) if self._whole else self._again(self._compiled, *args, **kwargs)
        except self._errors as error:
            self._shared.give_up()
            what = "" if torch.is_grad_enabled() else " where they have no gradients"
            reason = str(error).strip().partition("\n")[0]
            log.warning("torch_compile: the layers of this model are not compiled%s (%s).", what, reason)
            return self._plain(*args, **kwargs)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return self._again(self._own, *args, **kwargs)

    def _again(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run, and in the backward pass again if it is to be."""
        if self._remember is None or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        again = self._remember()
        own: Any = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": lambda: (nullcontext(), again())}
        return checkpoint(run, *args, **own, **kwargs)

    def _compile(self, backend: Backend) -> Callable[..., Any]:
        own = self._own if self._whole else _unwrapped(self._own)
        return torch.compile(own, fullgraph=self._whole, dynamic=True, backend=backend)


def _unwrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A bound forward pass without what Transformers wraps it in: checkpoints, which are made here, and old names.

    What breaks a graph in a function breaks it in each that calls it, and only the innermost can be compiled up to
    there: each wrapper (a layer cut by FSDP has three) costs as much tracing as the layer itself.
    """
    if not isinstance(forward, MethodType):
        return forward
    function: Any = forward.__func__
    while hasattr(function, "__wrapped__") and function.__globals__["__name__"] in _WRAPS_ALONE:
        function = function.__wrapped__
    return MethodType(function, forward.__self__)


def _leave_out(modules: Sequence[nn.Module], shared: Compiled, backend: Backend) -> None:
    """Have parts of layers run as they are, hooks and all; in place. Of experts the gate is compiled by itself."""
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for module in modules:
        own = type(module)
        if own not in classes:
            gates = {"_apply_gate": _gate(own, shared, backend)} if hasattr(own, "_apply_gate") else {}
            classes[own] = type(own.__name__, (own,), {"__call__": _as_it_is(own), **gates})
        # the class is exchanged: a compiler makes a function among a module's own attributes anew for each layer
        module.__class__ = classes[own]


def _as_it_is(own: type[nn.Module]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own.__call__(self, *args, **kwargs)

    return torch.compiler.disable(call, reason="it is to run as it is")


def _gate(experts: type[nn.Module], shared: Compiled, backend: Backend) -> Callable[..., Any]:
    own: Any = getattr(experts, "_apply_gate")  # noqa: B009 - a class of modules has none that is declared
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=backend)

    def gate(self: nn.Module, rows: Any) -> Any:
        # of parametrized experts (adapters) the class is made anew for each call, and so would be what is compiled
        return (own if shared.runs_plain or is_parametrized(self) else compiled)(self, rows)

    return gate


@lru_cache(maxsize=8)
def _keeping_inputs(backend: Backend) -> Callable[..., Any]:
    """A backend that keeps a function's inputs alone for its backward pass; one for all layers, which share by it what
    was compiled."""
    import torch._functorch.config
    from torch._dynamo.backends.registry import lookup_backend

    inner: Callable[..., Any] = lookup_backend(backend)
    patched: Callable[..., AbstractContextManager[None]] = torch._functorch.config.patch

    def compile_(graph: Any, inputs: Any, **options: Any) -> Any:
        with patched(activation_memory_budget=0.0):
            return inner(graph, inputs, **options)

    return compile_


def join_small_kernels(*, joins: bool) -> None:
    """Let Inductor make one kernel of several that do not depend on each other, as casts of adapters do not, or not.

    Of a micro-batch of chats a third of the kernels go. Where ranks exchange within a layer, steps become slower
    (docs/lab-notes.md).
    """
    import torch._inductor.config

    config: Any = torch._inductor.config
    config.combo_kernels = joins


def compile_layers(
    layers: Sequence[nn.Module],
    *,
    around: Sequence[nn.Module] = (),
    in_context: bool = False,
    backend: Backend = "inductor",
) -> Compiled:
    """Have layers compiled when they are first trained; in place.

    A layer that cannot be compiled ends it for all of them, with a warning; with gradients and without apart.

    Args:
        around: modules in them that are to run as they are.
        in_context: ranks share positions, and attention over them is to run as it is.

    Returns:
        what they share.
    """
    import torch._dynamo
    import torch._functorch.config

    if backend == "inductor":
        teach_inductor()
    # what is compiled stays on disk for the next run, also where a layer has functions of its own, as LoRA has
    functorch: Any = torch._functorch.config
    for setting in (
        "autograd_cache_allow_custom_autograd_functions",
        "force_non_lazy_backward_lowering",  # a backward pass that cannot be compiled is known in the forward pass
    ):
        if hasattr(functorch, setting):
            setattr(functorch, setting, True)
    torch._dynamo.config.optimize_ddp = False  # it cuts a function at DDP's buckets; a layer's gradients come together
    # or numbers of FSDP's modules, as a head's size, are symbols, which take most of the time that tracing takes
    torch._dynamo.config.skip_fsdp_guards = False
    torch._dynamo.config.specialize_float = True  # scales of adapters are constants, not inputs to read from the host
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    shared, left_out = Compiled(), set(around)
    _leave_out(around, shared, backend)
    if in_context:
        keep_from_compiler()
    for mixer in around:
        if isinstance(mixer.forward, MixerForward) and not mixer.forward.has_shortcut:
            mixer.forward.run = CompiledForward(mixer, shared, backend, own=mixer.forward.run, whole=False)
    for layer in layers:
        whole = not in_context and left_out.isdisjoint(layer.modules())
        layer.forward = CompiledForward(layer, shared, backend, whole=whole)
    return shared


def recompute_compiled(layers: Sequence[nn.Module], remember: Remember = _nothing) -> None:
    """Have compiled layers keep their inputs alone, and computed again in the backward pass.

    Args:
        remember: see `CompiledForward.recompute`.
    """
    for layer in layers:
        assert isinstance(layer.forward, CompiledForward)
        layer.forward.recompute(remember)
