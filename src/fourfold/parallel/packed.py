"""Parts of weights that bitsandbytes has packed into 4 bits, cut without unpacking.

A packed weight [out, in] holds two columns a byte, row by row, and one scale (`absmax`) for every `blocksize` columns
of a row where `in` is a multiple of it. Rows can be taken as they are; columns in whole blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fourfold.base.errors import PlanError
from fourfold.parallel.shares import Cut


def is_packed(layer: nn.Linear) -> bool:
    """Whether a linear layer holds weights packed into 4 bits."""
    return type(layer.weight).__name__ == "Params4bit" or hasattr(layer.weight, "quant_state")


def is_plain(weight: object) -> bool:
    """Whether a weight is a parameter of numbers as they are, and not of a quantised kind; fake ones count."""
    return type(weight) is nn.Parameter or (isinstance(weight, FakeTensor) and not hasattr(weight, "quant_state"))


def state_of(layer: nn.Module) -> Any:
    """bitsandbytes' QuantState of a packed layer; None before it is packed. What FSDP gathers has none of its own."""
    own = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if own is None else own


def cut_packed(layer: nn.Linear, name: str, cut: Cut) -> None:
    """Keep this rank's part of a packed layer's weight, in place. Scales that are quantised themselves are expanded.

    Args:
        layer: bitsandbytes' Linear4bit on its device, quantised.
        name: of the layer, for messages.
        cut: of the unpacked weight [out, in].
    Raises:
        PlanError: the part does not consist of whole blocks.
    """
    from bitsandbytes.functional import QuantState, dequantize_blockwise
    from bitsandbytes.nn.modules import Linear4bit

    assert isinstance(layer, Linear4bit)
    weight: Any = layer.weight
    state = weight.quant_state
    rows, columns = state.shape
    block = state.blocksize
    bounds = [bound for pair in cut.ranges for bound in pair]
    if columns % block or (cut.dim == 1 and any(bound % block for bound in bounds)):
        raise PlanError(
            f"parallel.tp: the quantised weight of {name} [{rows}, {columns}] has one scale for {block} columns, and a "
            f"part of {cut.size} of them is not whole blocks. Use fewer tp ranks, or no quantization_bit."
        )
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    storage = weight.data.dtype
    packed = weight.data.reshape(-1).view(torch.uint8).view(rows, columns // 2)
    scales = absmax.float().view(rows, columns // block)
    if cut.dim == 0:
        packed, scales = cut.take(packed), cut.take(scales)
    else:
        packed = Cut(1, tuple((a // 2, b // 2) for a, b in cut.ranges)).take(packed)
        scales = Cut(1, tuple((a // block, b // block) for a, b in cut.ranges)).take(scales)
    shape = (cut.size, columns) if cut.dim == 0 else (rows, cut.size)
    part = QuantState(
        absmax=scales.reshape(-1).contiguous(),
        shape=torch.Size(shape),
        code=state.code,
        blocksize=block,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    layer.weight = wrap_packed(layer, packed.reshape(-1).contiguous().view(storage).reshape(-1, 1), part)
    layer.quant_state = part  # type: ignore[assignment]


def store_packed_as(root: nn.Module, dtype: torch.dtype) -> bool:
    """Let packed weights lie in tensors of a floating dtype, in place: the same bytes under another name.

    FSDP gathers them with the rest of their layer, and before torch 2.12 it cannot hold parameters of integers. As
    numbers some are NaNs, so what copies them must copy their bits.

    Args:
        dtype: the one that FSDP gathers in, so that it casts nothing.
    Returns:
        whether there are any.
    """
    layers = [layer for layer in root.modules() if isinstance(layer, nn.Linear) and is_packed(layer)]
    for layer in layers:
        weight: Any = layer.weight
        if weight.dtype != dtype:
            data = weight.data.reshape(-1).view(torch.uint8).view(dtype).reshape(-1, 1)
            layer.weight = wrap_packed(layer, data, weight.quant_state)
            layer.quant_storage = dtype  # type: ignore[assignment]
    return bool(layers)


def wrap_packed(layer: nn.Linear, data: torch.Tensor, state: Any) -> nn.Parameter:
    """Packed data as bitsandbytes' parameter; of fake tensors, which cannot be one, as a plain one."""
    if isinstance(data, FakeTensor):
        return fake_packed(data, state)
    from bitsandbytes.nn.modules import Params4bit

    make: Any = Params4bit  # its constructor is not typed
    return make(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        quant_storage=data.dtype,
        bnb_quantized=True,
        module=layer,
    )


def fake_packed(data: torch.Tensor, state: Any) -> nn.Parameter:
    """A fake tensor as a packed weight with its scales."""
    weight: Any = nn.Parameter(data, requires_grad=False)
    weight.quant_state = state
    return weight
