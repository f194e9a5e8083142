"""Fitting a step into a device's memory: how large a micro-batch may be, and whether activations are recomputed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from fourfold.base.log import get_logger
from fourfold.base.units import GIB, format_bytes, format_count
from fourfold.dataset.collate import CutPolicy
from fourfold.models.noise import NoiseKeys
from fourfold.models.patches import recompute_noise_ignored
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.parallel.loss import CHUNK_TOKENS
from fourfold.parallel.recompute import Recompute, settings
from fourfold.parallel.sharded import local

log = get_logger(__name__)

_SHARE = 0.85
"""Of the free memory, what activations may take; the rest is for the allocator's gaps and the optimizer's buffers."""
_EFFICIENT_TOKENS = 2048
"""Above so many tokens a larger micro-batch is hardly faster, so cutting goes before recomputing."""


def peak_memory_figures() -> dict[str, float]:
    """Peak memory so far, in GiB: the allocator's on CUDA, the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return {
            "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_memory_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


def activation_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype, recompute: Recompute = "none") -> int:
    """Bytes that the forward pass of one token keeps for the backward pass; a rough figure.

    A llama-like layer keeps, in units of the compute dtype: about 9 hidden sizes (norms with their fp32 copies,
    residuals, inputs of the linear layers), 2 * (q + 2 kv) for queries, keys and values before and after rotation,
    and 4 intermediate sizes. Measured with LoRA on a Llama-3-8B shape: 6.0 MB a token; this gives 6.8 MB.

    Under selective recompute it keeps its input and the results of products and attention: 3 hidden sizes, 2 q + 2 kv
    and 2 intermediate sizes; under full recompute its input alone.
    """
    hidden = config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    active = getattr(config, "num_experts_per_tok", None)
    expert = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 4 * hidden)
    intermediate = expert * active if active else config.intermediate_size
    units = {
        "none": 9 * hidden + 2 * (heads + 2 * kv_heads) * head_dim + 4 * intermediate,
        "selective": 3 * hidden + 2 * (heads + kv_heads) * head_dim + 2 * intermediate,
        "full": hidden,
    }[recompute]
    return units * dtype.itemsize * config.num_hidden_layers


def logits_bytes(config: PreTrainedConfig) -> int:
    """Bytes of one chunk of logits with its fp32 copy, its softmax and its gradient."""
    return CHUNK_TOKENS * config.vocab_size * 14


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Tokens that must fit.

    Attributes:
        longest: tokens of the longest sample, which cannot be cut.
        step: tokens of one optimizer step.
    """

    longest: int
    step: int


@dataclass(frozen=True, slots=True)
class Fit:
    """How a step is made to fit.

    Attributes:
        policy: with a limit on tokens that is expected to fit.
        recompute: what the backward pass computes again.
    """

    policy: CutPolicy
    recompute: Recompute


def choose_fit(
    policy: CutPolicy, sizes: StepSizes, *, room: Callable[[Recompute], int], recompute: Recompute | None
) -> Fit:
    """Cut before recomputing, recompute before giving up, and first what costs least.

    Args:
        policy: the limit that the config allows.
        room: tokens whose activations fit under a kind of recompute.
        recompute: the user's word, None to choose.
    """
    wanted = max(sizes.longest, min(policy.max_tokens, sizes.step))
    if recompute is None:
        enough = max(sizes.longest, min(wanted, _EFFICIENT_TOKENS))
        recompute = "none" if room("none") >= enough else "selective" if room("selective") >= enough else "full"
    if recompute == "full":
        return Fit(policy, recompute)
    return Fit(replace(policy, max_tokens=min(policy.max_tokens, max(room(recompute), sizes.longest))), recompute)


def fit_to_memory(
    policy: CutPolicy,
    module: TunedModel,
    sizes: StepSizes,
    dtype: torch.dtype,
    recompute: Recompute | None,
    *,
    device: torch.device,
    sharing: int = 1,
    offload: Literal["none", "optimizer", "params"] = "none",
) -> Fit:
    """Choose for a loaded model on its device. A CPU's memory is left to the system: nothing is cut for it.

    Args:
        dtype: of the activations.
        recompute: the user's word, None to choose.
        sharing: ranks that share the positions of a row.
        device: where it computes.
        offload: what the host keeps.
    """
    if device.type != "cuda":
        return Fit(policy, recompute or "none")
    config = base_model(module).config
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    trained = sum(local(p).nbytes for p in module.parameters() if p.requires_grad)
    # Gradients and Adam's two moments of what is trained are still to come, as far as the device holds them.
    to_come = {"none": 3, "optimizer": 1, "params": 0}[offload] * trained
    left = max(int((free - to_come) * _SHARE) - logits_bytes(config), 0)
    fit = choose_fit(
        policy,
        sizes,
        room=lambda kind: sharing * left // activation_bytes_per_token(config, dtype, kind),
        recompute=recompute,
    )
    log.info(
        "Activations are %s: about %s a token, %s free; micro-batches of up to %s tokens",
        _WORDS[fit.recompute],
        format_bytes(activation_bytes_per_token(config, dtype, fit.recompute)),
        format_bytes(free),
        format_count(fit.policy.max_tokens),
    )
    return fit


_WORDS: Mapping[Recompute, str] = {
    "none": "kept",
    "selective": "kept where products make them, else computed again in the backward pass",
    "full": "computed again in the backward pass",
}


def enable_recompute(module: TunedModel, kind: Recompute, noise: NoiseKeys) -> None:
    """Compute every decoder layer's activations again in the backward pass, all of them or what is cheap.

    Args:
        kind: selective or full.
        noise: whose keys a layer's dropout reads; each micro-batch's are put back.
    """
    model = base_model(module)
    random = bool(getattr(model.config, "attention_dropout", 0.0)) or any(
        isinstance(layer, nn.Dropout) and layer.p > 0 for layer in module.modules()
    )
    kwargs = settings(kind, remember=noise.remembered, random=random)
    with recompute_noise_ignored():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
