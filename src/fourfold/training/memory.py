"""Fitting a step into a device's memory: how large a micro-batch may be, and whether activations are recomputed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from fourfold.base.bisection import largest_that
from fourfold.base.log import get_logger
from fourfold.base.units import GIB, format_bytes, format_count
from fourfold.dataset.collate import CutPolicy
from fourfold.models.document_rows import read_besides
from fourfold.models.noise import NoiseKeys
from fourfold.models.patches import recompute_noise_ignored
from fourfold.models.targets import decoder_blocks
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.parallel.recompute import Recompute, settings
from fourfold.parallel.sharded import local
from fourfold.parallel.stacked_experts import find_experts
from fourfold.planning.keeps import NOTHING, Keeps, room_for_step
from fourfold.planning.predictor import Form
from fourfold.training.outlook import Outlook
from fourfold.training.step_sizes import StepSizes

log = get_logger(__name__)

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


@dataclass(frozen=True, slots=True)
class Fit:
    """How a step is made to fit.

    Attributes:
        policy: with a limit on tokens that is expected to fit.
        recompute: what the backward pass computes again.
        keeps: what there is room for beside it.
    """

    policy: CutPolicy
    recompute: Recompute
    keeps: Keeps = NOTHING


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
    recompute: Recompute | None,
    *,
    device: torch.device,
    outlook: Outlook | None,
    planned: Form | None = None,
    spares: bool = False,
) -> Fit:
    """Choose for a loaded model on its device. A CPU's memory is left to the system: nothing is cut for it.

    Args:
        recompute: the user's word, None to choose.
        device: where it computes.
        outlook: what the planner knows of the run; None if nothing, and then nothing is cut either.
        planned: what the layout was chosen with; taken if the steps are as large as that and it fits what is free.
        spares: some layers may be computed again, and others not.
    """
    chosen_by_user = recompute is not None
    if planned is not None:
        policy = replace(policy, max_tokens=min(policy.max_tokens, planned.micro_batch))
    if device.type != "cuda" or outlook is None:
        return Fit(policy, recompute or "none")
    if recompute is None and outlook.layout.splits_backward:
        recompute = "none"  # zbv computes a layer again for each of its matrices, and keeps all of it meanwhile
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free -= outlook.not_seen(sum(local(p).nbytes for p in module.parameters() if p.requires_grad))
    fit = fit_to_bytes(policy, sizes, recompute, free=free, need=outlook.to_come, planned=planned)
    largest = sizes.largest_micro_batch(fit.policy.max_tokens)
    keeps = outlook.what_fits(fit.recompute, largest, free, spares=spares and not chosen_by_user)
    log.info(
        "Activations are %s%s; micro-batches of up to %s tokens; %s are free, and a step is expected to take %s",
        _WORDS[fit.recompute],
        f", but for {keeps.spared} of {outlook.shape.num_layers} layers" if keeps.spared else "",
        format_count(fit.policy.max_tokens),
        format_bytes(free),
        format_bytes(outlook.keeping(keeps).to_come(fit.recompute, largest)),
    )
    return replace(fit, keeps=keeps)


def fit_to_bytes(
    policy: CutPolicy,
    sizes: StepSizes,
    recompute: Recompute | None,
    *,
    free: int,
    need: Callable[[Recompute, int], int],
    planned: Form | None = None,
) -> Fit:
    """What was planned if it fits; else as `choose_fit` has it.

    Args:
        free: bytes of the device.
        need: bytes that a step takes with a kind of recompute and micro-batches of so many tokens.
    """
    if planned is not None and max(sizes.longest, sizes.step) >= planned.micro_batch:
        largest = max(sizes.longest, policy.max_tokens)
        if need(planned.recompute, largest) <= free:
            return Fit(policy, planned.recompute)
    left, most = room_for_step(free), max(policy.max_tokens, sizes.longest)
    return choose_fit(policy, sizes, room=lambda kind: _room(kind, need, left, most), recompute=recompute)


def _room(kind: Recompute, need: Callable[[Recompute, int], int], left: int, most: int) -> int:
    """Tokens of the largest micro-batch, of at most so many, that needs no more than what is left."""
    return largest_that(lambda tokens: need(kind, tokens) <= left, most)


_WORDS: Mapping[Recompute, str] = {
    "none": "kept",
    "selective": "kept where products make them, else computed again in the backward pass",
    "full": "computed again in the backward pass",
}


SWITCH = "gradient_checkpointing"
"""Transformers' name, at each layer, for whether it is computed again."""


def enable_recompute(module: TunedModel, kind: Recompute, noise: NoiseKeys, spared: int = 0) -> None:
    """Compute decoder layers' activations again in the backward pass, all of them or what is cheap.

    Args:
        kind: selective or full.
        noise: whose keys a layer's dropout reads; each micro-batch's are put back.
        spared: layers of which nothing is computed again: the last ones, whose activations are needed first. They must
            have the switch.
    """
    model = base_model(module)
    random = bool(getattr(model.config, "attention_dropout", 0.0)) or any(
        isinstance(layer, nn.Dropout) and layer.p > 0 for layer in module.modules()
    )
    biases = any(bool(getattr(experts, "has_bias", False)) for _, experts in find_experts(model))
    kwargs = settings(kind, remember=read_besides(model, noise), random=random, grouped_biases=biases)
    with recompute_noise_ignored():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    # which reentrant checkpoints need alone; frozen layers at the bottom would have gradients, and keep what these take
    model.disable_input_require_grads()
    for layer in list(decoder_blocks(model)[1])[-spared:] if spared else ():
        setattr(layer, SWITCH, False)
