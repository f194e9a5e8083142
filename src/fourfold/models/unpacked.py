"""4-bit weights that are unpacked once and kept, where a device has room for them.

A frozen weight that was packed is the same each time that it is unpacked. Where memory is plentiful there is no reason
to do so in every forward and backward pass: the numbers are those of QLoRA, the speed is that of LoRA.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fourfold.base.peft import Linear, LoraLayer
from fourfold.models.lora import use_short_forward
from fourfold.models.low_rank import FrozenWeight, whole
from fourfold.parallel.packed import is_packed


def keep_unpacked(model: nn.Module) -> int:
    """Make plain layers of all that bitsandbytes has packed into 4 bits, one after the other, in place.

    Layers stay the objects that they are, with their hooks, and adapters their parameters. To be done before a step is
    compiled or recorded.

    Args:
        model: on its device, with what this rank has of it for good.
    Returns:
        how many layers were packed.
    """
    count = 0
    for parent in list(model.modules()):
        for layer in parent.children():
            if not isinstance(layer, nn.Linear) or not is_packed(layer):
                continue
            _unpack(layer)
            count += 1
            if isinstance(parent, LoraLayer):
                _adapt_plain(parent)
    if count:
        use_short_forward(model)
    return count


def _unpack(packed: Any) -> None:
    """Give a packed layer the weight that it stands for, in the dtype in which it computes."""
    weight = whole(FrozenWeight.packed([packed]), packed.compute_dtype)
    packed.__class__ = nn.Linear
    packed.weight = nn.Parameter(weight, requires_grad=False)
    for name in ("quant_state", "quant_storage", "compute_dtype"):
        packed.__dict__.pop(name, None)


def _adapt_plain(adapted: Any) -> None:
    """Make one of PEFT's layers around 4 bits one around a plain layer, in place."""
    adapted.__class__ = Linear
    adapted.fan_in_fan_out = adapted.is_target_conv_1d_layer = False
    adapted.__dict__.pop("siblings", None)
