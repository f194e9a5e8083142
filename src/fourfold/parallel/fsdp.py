"""Fully sharded data parallelism (ZeRO stages 1 to 3, with or without replicas) by PyTorch's FSDP2.

A layer is the unit: its weights are gathered whole for its forward and backward pass, so the largest layer with its
gradient must fit a device, not the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.library import Library

from fourfold.parallel.exchange import reduce_scatter_single
from fourfold.parallel.packed import store_packed_as


class ReduceScatter:
    """What FSDP scatters gradients by where their shards, which stay until the optimizer has used them, are to lie in
    the memory of the stream that computes.

    FSDP asks for them on its own stream, and PyTorch's allocator keeps memory for the stream that asked first: a share
    of all gradients, which nothing else could use while activations are there.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent, asked for on the computing stream, or for what arrives, on FSDP's own.

        FSDP's stream has been told to wait for the computing one before it asks, so what that one is done with may be
        written to; the allocator is told that FSDP's stream uses it, so that it is not given away too early.
        """
        asking = torch.cuda.current_stream(device)
        with torch.cuda.stream(torch.cuda.default_stream(device)):
            found = torch.empty(*size, dtype=dtype, device=device)
        if asking != torch.cuda.default_stream(device):
            found.record_stream(asking)
        return found

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """As PyTorch's own."""
        return reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    reshard: bool,
    compute: torch.dtype | None,
    on_host: bool = False,
    apart: Sequence[nn.Module] = (),
    apart_mesh: DeviceMesh | None = None,
) -> FSDPModule:
    """Shard a model's parameters, in place, over a mesh.

    Args:
        root: the module whose forward pass is called; what no block holds (embedding, last norm, head) is its own unit.
        blocks: the decoder layers.
        mesh: [dp_shard] or [dp_replicate, dp_shard].
        reshard: free gathered weights after each forward pass.
        compute: dtype of gathered weights and of the computation; None for that of the parameters.
        on_host: keep the shards, their gradients and so the optimizer's work on the host.
        apart: modules of the blocks that fewer ranks hold alike (a part of the experts), which are their own units.
        apart_mesh: those ranks, [dp_shard] or [dp_replicate, dp_shard].
    """
    if store_packed_as(root, compute or torch.float32):
        _copy_bits()
    # pinned where a GPU reads it; without one there is nothing to pin for
    host: OffloadPolicy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if on_host else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    for module in apart:
        # Their inputs stay as the layer made them: routers may weight in fp32.
        uncast = replace(policy, cast_forward_inputs=False)
        fully_shard(module, mesh=apart_mesh, reshard_after_forward=reshard, mp_policy=uncast, offload_policy=host)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": host}
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, **settings)
    sharded = fully_shard(root, reshard_after_forward=False, **settings)
    assert isinstance(sharded, FSDPModule)
    # Some layers (opt, gpt2) end in a view, which torch 2.13 warns of at every call: nothing writes into one here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by global denominators already, so gradients are to be added up, not averaged. The
            # factor alone would ask gloo for a reduction that it does not have.
            if module not in apart or apart_mesh is None or apart_mesh.size() > 1:  # a rank alone divides, in a copy
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return sharded


@cache
def _copy_bits() -> Library:
    """Have FSDP copy what it gathers as it is; returns what does, which lasts as long as it.

    On CUDA `torch._foreach_copy_` makes every NaN of 16 bits the same one. Packed weights that lie in such tensors have
    bytes that read as NaNs, 1 pair in 260 in bf16 and 1 in 32 in fp16, and gathered weights were then wrong without a
    word: losses of QLoRA on 4 H100 in bf16 by 4e-3, from the first step on. Numbers are copied as integers instead.
    Last seen in torch 2.11 (pytorch/pytorch#159333, bitsandbytes-foundation/bitsandbytes#1945).
    """

    def copy_in(inputs: list[Tensor], output: Tensor, sizes: list[int], numel: int, rank: int) -> tuple[Tensor, Tensor]:
        own = output.narrow(0, numel * rank, numel)
        with torch.no_grad():
            parts = [_bits(part) for part in own.split(sizes)]
            torch._foreach_copy_(parts, [_bits(part) for part in inputs])  # pyright: ignore[reportPrivateImportUsage]
        return own, output

    library = Library("fsdp", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*previously registered kernel")
        for key in ("CUDA", "CPU"):
            library.impl("all_gather_copy_in", copy_in, key, allow_override=True)
    return library


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int16) if values.dtype in (torch.bfloat16, torch.float16) else values


def join_gradients(root: nn.Module) -> None:
    """Have the shards of a sharded model's gradients lie where all else does, on CUDA; see `ReduceScatter`."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(ReduceScatter())  # type: ignore[arg-type]
