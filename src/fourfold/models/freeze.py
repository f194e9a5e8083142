"""Freeze tuning: a few layers are trained, all else stays."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.config.tuning import TuningConfig
from fourfold.models.targets import ALL, INDEXERS, check_modules, decoder_blocks, refuse_missing

log = get_logger(__name__)

_COUNTED = ("e_score_correction_bias", "expert_bias")
"""By which routers choose experts, not weigh them: it follows how many tokens each gets. A parameter in some families
(afmoe, ernie4_5_moe, laguna), a buffer in others."""


def unfreeze(model: PreTrainedModel, tuning: TuningConfig) -> None:
    """Make the chosen layers and modules of a frozen model trainable.

    `freeze_trainable_layers` takes the last n layers, or the first n if it is negative; within them
    `freeze_trainable_modules` names direct children (`self_attn`, `mlp`) or anything below them, and
    `freeze_extra_modules` names modules outside the layers.

    Raises:
        ConfigError: more layers than there are, a name that matches nothing, or nothing left to train.
    """
    prefix, blocks = decoder_blocks(model)
    count, total = tuning.freeze_trainable_layers, len(blocks)
    if abs(count) > total:
        raise ConfigError(
            f"freeze_trainable_layers: {count} exceeds the model's {total} layers. Use {-total} to {total}."
        )
    chosen = range(total - count, total) if count > 0 else range(-count)
    modules = tuning.freeze_trainable_modules
    if ALL not in modules:
        inner = dict.fromkeys(name for block in blocks for name, _ in block.named_modules() if name)
        missing = [want for want in modules if not any(_within(name, want) for name in inner)]
        children = list(dict.fromkeys(name for block in blocks for name, _ in block.named_children()))
        refuse_missing(model, "freeze_trainable_modules", missing, [ALL, *children])
    for index in chosen:
        for name, parameter in blocks[index].named_parameters():
            if ALL in modules or any(_within(name, want) for want in modules):
                parameter.requires_grad_(True)
    _unfreeze_outside(model, prefix, tuning.freeze_extra_modules)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze_trainable_layers: 0 leaves nothing to train. Use another number, or name some "
                          "freeze_extra_modules.")  # fmt: skip
    log.info("Training layers: %s", ", ".join(map(str, chosen)) or "none")


def freeze_choices(model: nn.Module) -> None:
    """Take out of what is trained what chooses experts or positions and has no gradient: ranks would wait for one."""
    for name, parameter in model.named_parameters():
        if name.endswith(_COUNTED) or INDEXERS in name:
            parameter.requires_grad_(False)


def _unfreeze_outside(model: PreTrainedModel, prefix: str, extra: tuple[str, ...]) -> None:
    check_modules(model, "freeze_extra_modules", extra)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix + ".") and any(_within(name, want) for want in extra):
            parameter.requires_grad_(True)


def _within(name: str, want: str) -> bool:
    """Whether `want` is a whole part of a dotted name: `mlp` and `mlp.up_proj` are in `mlp.up_proj.weight`."""
    return f".{want}." in f".{name}."
