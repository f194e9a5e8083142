"""Parts of weights that bitsandbytes has packed into 4 bits, cut without unpacking.

A packed weight [out, in] holds two columns a byte, row by row, and one scale (`absmax`) for every `blocksize` columns
of a row where `in` is a multiple of it. Rows can be taken as they are; columns in whole blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fourfold.base.errors import PlanError
from fourfold.parallel.mesh import is_ampere_or_later
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


class PackedWeight(NamedTuple):
    """A weight packed into 4 bits, in tensors and plain values that an operator can be given.

    Attributes:
        data: two columns a byte, in whatever dtype they are stored.
        scales: one a block, fp32; or, where they are packed themselves, as codes [uint8] with what unpacks those:
            their scales, the table of codes, what is added, and the table of the weight's own codes.
        sizes: rows, columns, columns of a block, and scales of a block of scales (0 where they are plain).
        kind: nf4 or fp4.
        dtype: of the weight before it was packed.
    """

    data: Tensor
    scales: list[Tensor]
    sizes: list[int]
    kind: str
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Module) -> PackedWeight:
        """The weight of bitsandbytes' Linear4bit on its device."""
        weight: Any = layer.weight
        state = state_of(layer)
        scales, second = [state.absmax], 0
        if state.nested:
            nested = state.state2
            scales, second = [state.absmax, nested.absmax, nested.code, state.offset, state.code], nested.blocksize
        rows, columns = state.shape
        return cls(weight.data, scales, [rows, columns, state.blocksize, second], state.quant_type, state.dtype)


def unpack(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] in `dtype`."""
    rows, columns, block, second = packed.sizes
    absmax = packed.scales[0]
    operators = torch.ops.bitsandbytes
    if second:
        codes, scales, table, offset, own_table = packed.scales
        in_one = packed.kind == "nf4" and rows * columns % block == 0
        if in_one and packed.data.is_cuda and is_ampere_or_later(packed.data.device.index):
            from fourfold.parallel.unpack_kernel import unpack_nf4

            found = unpack_nf4(packed.data, codes, scales, table, offset, own_table, packed.sizes, packed.dtype)
            return found.to(dtype)
        absmax = operators.dequantize_blockwise(codes, scales, table, second, torch.float32) + offset
    return operators.dequantize_4bit(packed.data, absmax, block, packed.kind, [rows, columns], packed.dtype).to(dtype)


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


def store_packed_as(root: nn.Module, dtype: torch.dtype) -> None:
    """Let packed weights lie in tensors of a floating dtype, in place: the same bytes under another name.

    FSDP gathers them with the rest of their layer, and before torch 2.12 it cannot hold parameters of integers.

    Args:
        dtype: the one that FSDP gathers in, so that it casts nothing.
    """
    for layer in root.modules():
        if isinstance(layer, nn.Linear) and is_packed(layer) and layer.weight.dtype != dtype:
            weight: Any = layer.weight
            data = weight.data.reshape(-1).view(torch.uint8).view(dtype).reshape(-1, 1)
            layer.weight = wrap_packed(layer, data, weight.quant_state)
            layer.quant_storage = dtype  # type: ignore[assignment]


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
