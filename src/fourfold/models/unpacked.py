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
    """Put plain layers in the place of all that bitsandbytes has packed into 4 bits, one after the other.

    Adapters stay the parameters that they are. To be done before a step is compiled or recorded.

    Args:
        model: on its device, not split over ranks.
    Returns:
        how many layers were packed.
    """
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or not is_packed(layer):
                continue
            setattr(parent, name, _plain(layer))
            count += 1
            if isinstance(parent, LoraLayer):
                _adapt_plain(parent)
    if count:
        use_short_forward(model)
    return count


def _plain(packed: Any) -> nn.Linear:
    """A layer with the weight that a packed one stands for, in the dtype in which it computes."""
    weight = whole(FrozenWeight.packed([packed]), packed.compute_dtype)
    layer = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = packed.bias
    return layer.train(packed.training)


def _adapt_plain(adapted: Any) -> None:
    """Make one of PEFT's layers around 4 bits one around a plain layer, in place."""
    adapted.__class__ = Linear
    adapted.fan_in_fan_out = adapted.is_target_conv_1d_layer = False
    adapted.__dict__.pop("siblings", None)
