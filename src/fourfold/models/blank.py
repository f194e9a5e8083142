"""A model as a run would load it, with weights that mean nothing: for what depends on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from fourfold.config.schema import Run
from fourfold.models.adapters import attach
from fourfold.models.load import build_without_weights, prepare_config
from fourfold.models.patches import adapters_have_weights
from fourfold.models.stream import materialize
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.models.value_head import add_value_head, learns_level, reads_logits, reads_values
from fourfold.parallel.apply import no_weights
from fourfold.parallel.packed import wrap_packed
from fourfold.parallel.sharded import local
from fourfold.parallel.shares import Shares
from fourfold.planning.read_shape import own_quantization
from fourfold.planning.states import BLOCK, OUTER_BLOCK

_STD = 0.02


def blank_model(
    run: Run,
    dtype: torch.dtype,
    master: torch.dtype | None,
    device: torch.device,
    *,
    on_meta: bool,
    trainable: bool = True,
) -> tuple[TunedModel, Callable[[Shares], None]]:
    """The model of a run with its adapters.

    Args:
        dtype, master: of the weights as loaded and of those that are trained (training/precision.py).
        device: where the weights are.
        on_meta: leave plain weights without memory, to be filled once the model is split.
        trainable: False for a model of which nothing is trained.
    Returns:
        the model, and what gives each rank's part of it memory.
    """
    with _disable_current_modes():
        model, bits = _without_weights(run, dtype)
        if bits:  # scales and all
            on_meta = False
        with adapters_have_weights():
            stage = run.training.stage
            module = attach(
                model.eval(),
                run.model,
                run.tuning,
                trainable=trainable,
                master_dtype=master,
                reads_logits=reads_logits(stage),
            )
        if reads_values(stage):
            add_value_head(
                module, run.model, seed=run.training.seed, dtype=master or dtype, trains_bias=learns_level(stage)
            )
    if not on_meta:
        _give_memory(module, device)
        return module, no_weights

    def fill(shares: Shares) -> None:
        materialize(module, device, on_host=run.parallel.offload == "params")
        _randomize(base_model(module))

    return module, fill


def _without_weights(run: Run, dtype: torch.dtype) -> tuple[PreTrainedModel, int | None]:
    """The base model on the meta device, and the bits that its linear layers are packed into."""
    config, options = prepare_config(run.model, dtype, run.data.cutoff_len)
    own_bits, own_double = own_quantization(config)
    bits = run.model.quantization_bit or own_bits
    if bits:  # the packing below is told to the model afterwards
        config.quantization_config = None
    model = build_without_weights(config, run.model, options)
    if bits:
        double = own_double if own_bits else run.model.double_quantization
        _pack(model, dtype, double=double, kind=run.model.quantization_type)
    return model, bits


@torch.no_grad()
def _give_memory(module: nn.Module, device: torch.device) -> None:
    """Replace every tensor by one of the same shape on `device`; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _made(owner, parameter, device)
            owner._parameters[name] = made[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)


def _made(owner: nn.Module, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    data = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
    if not hasattr(parameter, "quant_state"):
        if data.is_floating_point():
            data.normal_(std=_STD)
        return nn.Parameter(data, parameter.requires_grad)
    layer: Any = owner
    state = layer.quant_state
    for holder in (state, state.state2):
        if holder is not None:
            holder.absmax, holder.code = torch.zeros_like(holder.absmax, device=device), holder.code.to(device)
    if state.nested:
        state.offset = torch.zeros((), device=device)
    return wrap_packed(layer, data, state)


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        own = local(parameter)
        if own.is_floating_point():
            own.normal_(std=_STD)


def _pack(model: PreTrainedModel, dtype: torch.dtype, *, double: bool, kind: str) -> None:
    """Put bitsandbytes' 4-bit layers, without weights, in the place of linear layers, in place."""
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn.modules import Linear4bit

    code = get_4bit_type(kind, device="cpu")
    head = model.get_output_embeddings()
    on_meta = partial(torch.empty, device="meta")
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        packed = Linear4bit(layer.in_features, layer.out_features, False, dtype, double, kind, torch.uint8, "meta")
        scales = -(-layer.weight.numel() // BLOCK)
        outer = QuantState(
            absmax=on_meta(-(-scales // OUTER_BLOCK), dtype=torch.float32),
            code=torch.zeros(256),
            blocksize=OUTER_BLOCK,
            dtype=torch.float32,
        )
        state = QuantState(
            absmax=on_meta(scales, dtype=torch.uint8 if double else torch.float32),
            shape=layer.weight.shape,
            code=code,
            blocksize=BLOCK,
            quant_type=kind,
            dtype=dtype,
            offset=torch.zeros(()) if double else None,
            state2=outer if double else None,
        )
        packed.weight = wrap_packed(packed, on_meta(-(-layer.weight.numel() // 2), 1, dtype=torch.uint8), state)
        packed.quant_state = state  # type: ignore[assignment] - not declared
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(name, packed)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
