"""Keeping on the host what the device needs later: activations between the forward and the backward pass.

(Parameters go to the host by FSDP's own policy, parallel/fsdp.py; the optimizer's state by parallel/host_adamw.py.)
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fourfold.parallel.sharded import local

SMALLEST_BYTES = 1 << 20
"""Tensors below this stay: a copy costs more time than it saves memory."""
_AHEAD = 4
"""Tensors that are fetched before the backward pass asks for them."""


def offload_activations(root: nn.Module, blocks: Sequence[nn.Module], *, smallest: int = SMALLEST_BYTES) -> HostCopies:
    """Move what `root`'s forward pass keeps for the backward pass to the host, in place; call it once all is split.

    Args:
        root: the module whose forward pass is called.
        blocks: its decoder layers, whose weights are left where they are.
        smallest: bytes from which on a tensor is moved.
    """
    copies = HostCopies(smallest)
    forward = root.forward

    @functools.wraps(forward)
    def moved(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        copies.begin()
        copies.leave(root)
        with saved_tensors_hooks(copies.pack, copies.unpack):
            return forward(*args, **kwargs)

    root.forward = moved
    for block in blocks:
        # after FSDP's own, so that the weights are the gathered ones
        block.register_forward_pre_hook(lambda module, args: copies.leave(module))
    return copies


class _Copy:
    """A tensor on the host, and what is needed to have it back.

    Attributes:
        host: the copy, pinned where the device is a GPU.
        device: where it came from.
        earlier: the copies of its forward pass that were made before it.
        fetched: the tensor on its device again, once that has begun.
        done: when it is there.
    """

    def __init__(self, host: Tensor, device: torch.device, order: list[weakref.ref[_Copy]]) -> None:
        self.host, self.device = host, device
        self._order, self._place = order, len(order)
        self.fetched: Tensor | None = None
        self.done: torch.cuda.Event | None = None
        order.append(weakref.ref(self))

    def earlier(self, count: int) -> Iterator[_Copy]:
        """So many of those that were made before it and are still needed, the latest first."""
        for reference in reversed(self._order[max(self._place - count, 0) : self._place]):
            copy = reference()
            if copy is not None:
                yield copy


class HostCopies:
    """The two functions of `saved_tensors_hooks`, and what they share in one forward pass.

    On a GPU, copies run on a stream of their own beside the computation; the backward pass uses tensors in about the
    reverse order, so those before the one that is asked for are fetched with it.

    Attributes:
        moved_bytes: of all tensors that were moved in the last forward pass.
    """

    def __init__(self, smallest: int) -> None:
        self._smallest = smallest
        self._weights: set[int] = set()
        self._shapes: set[tuple[int, ...]] = set()
        self._order: list[weakref.ref[_Copy]] = []
        self._stream: torch.cuda.Stream | None = None
        self.moved_bytes = 0

    def begin(self) -> None:
        """A new forward pass."""
        self._order = []
        self._weights.clear()
        self.moved_bytes = 0

    def leave(self, module: nn.Module) -> None:
        """Do not move the parameters that a module has now, nor what autocast makes of them (known by its shape)."""
        for parameter in module.parameters():
            tensor = local(parameter.detach())
            self._weights.add(tensor.untyped_storage()._cdata)
            self._shapes |= {tuple(tensor.shape), tuple(reversed(tensor.shape))}

    def pack(self, tensor: Tensor) -> Tensor | _Copy:
        """What autograd keeps in place of a tensor."""
        weight = tuple(tensor.shape) in self._shapes or tensor.untyped_storage()._cdata in self._weights
        if weight or tensor.nbytes < self._smallest or type(tensor) is not Tensor:
            return tensor
        self.moved_bytes += tensor.nbytes
        return _Copy(self._to_host(tensor), tensor.device, self._order)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=True)
        stream = self._side_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before the copy is done
        return host

    def unpack(self, kept: Tensor | _Copy) -> Tensor:
        """The tensor, on its device."""
        if isinstance(kept, Tensor):
            return kept
        if kept.device.type != "cuda":
            return kept.host.to(kept.device)
        self._fetch(kept)
        for copy in kept.earlier(_AHEAD):
            self._fetch(copy)
        assert kept.fetched is not None and kept.done is not None
        stream = torch.cuda.current_stream(kept.device)
        stream.wait_event(kept.done)
        tensor, kept.fetched = kept.fetched, None
        tensor.record_stream(stream)
        return tensor

    def _fetch(self, copy: _Copy) -> None:
        """Begin to bring a tensor back, unless that has begun."""
        if copy.fetched is None:
            with torch.cuda.stream(self._side_stream(copy.device)):
                copy.fetched = copy.host.to(copy.device, non_blocking=True)
                copy.done = torch.cuda.Event()
                copy.done.record()

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream
