"""Keys of TRL's trainers that have another name here; those of the same name need no entry."""

from __future__ import annotations

from typing import ClassVar

from fourfold.config.compat.translation import renamed, translated
from fourfold.config.key import NoCounterpart, Section, Translation

_GROUP_LOSSES = ("grpo", "dapo", "dr_grpo")
_PAIR_LOSSES = {
    "sigmoid": "sigmoid",
    "hinge": "hinge",
    "ipo": "ipo",
    "robust": "robust",
    "exo_pair": "exo",
    "sppo_hard": "sppo",
}


def _loss_type(value: str) -> Translation:
    if value == "grpo":  # our default; left unset, since with importance_sampling_level: sequence it is gspo
        return Translation({})
    if value in _GROUP_LOSSES:
        notes = ("clip_high is 0.28 unless it is given",) if value == "dapo" else ()
        return Translation({"grpo_variant": value}, notes)
    if value in _PAIR_LOSSES:
        return Translation({"pref_loss": _PAIR_LOSSES[value]})
    known = ", ".join((*_GROUP_LOSSES, *_PAIR_LOSSES))
    raise NoCounterpart(f"{value!r} has no counterpart. Use one of {known}, or grpo_variant or pref_loss.")


def _sampling_level(value: str) -> Translation:
    if value == "token":
        return Translation({})
    if value == "sequence":
        return Translation({"grpo_variant": "gspo"})
    raise NoCounterpart(f"{value!r} has no counterpart. Use token or sequence.")


class TrlKeys(Section):
    """Keys of TRL's GRPOConfig and DPOConfig."""

    title: ClassVar[str] = "TRL"

    beta: float | None = translated(
        None,
        "Weight of the pull towards the reference model.",
        lambda value: Translation({"kl_weight": value, "pref_beta": value}),
        "kl_weight (stage grpo) and pref_beta (stages dpo and kto)",
        ge=0,
    )
    epsilon: float = renamed(0.2, "How far below 1 a probability ratio counts.", "clip_low")
    epsilon_high: float | None = renamed(None, "How far above 1 a probability ratio counts.", "clip_high")
    loss_type: str | None = translated(None, "The loss.", _loss_type, "grpo_variant, or pref_loss")
    importance_sampling_level: str | None = translated(
        None, "Whether ratios are of tokens or of whole completions.", _sampling_level, "grpo_variant: gspo"
    )
    max_completion_length: int | None = renamed(None, "Longest completion, in tokens.", "max_new_tokens")
