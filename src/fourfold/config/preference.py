"""Keys of the preference and reinforcement stages: rm, dpo, kto, ppo, grpo, kd."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.key import LocalPath, PathList, Section, key

_KD = "Distillation"


class PreferenceConfig(Section):
    """Losses on pairs and tags, the reference model, the reward model, PPO, the teacher."""

    title: ClassVar[str] = "Preference"

    pref_beta: float = key(0.1, "Strength of the pull towards the reference model.", ge=0)
    pref_ftx: float = key(0.0, "Weight of an added SFT loss on the chosen answer.", ge=0)
    pref_bco_weight: float = key(0.0, "Weight of the binary classifier loss.", ge=0)
    pref_loss: Literal["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo", "robust", "exo", "sppo"] = key(
        "sigmoid", "The loss of stage dpo."
    )
    dpo_label_smoothing: float = key(0.0, "Share of pairs assumed to be labelled the wrong way round.", ge=0, le=0.5)
    kto_chosen_weight: float = key(1.0, "Weight of desirable answers.", ge=0)
    kto_rejected_weight: float = key(1.0, "Weight of undesirable answers.", ge=0)
    simpo_gamma: float = key(0.5, "Target margin of SimPO.", ge=0)
    ld_alpha: float | None = key(None, "Weight of the tokens beyond the shorter answer's length (LD-DPO).", ge=0, le=1)

    precompute_ref_log_probs: bool = key(
        False, "Compute the reference's log-probabilities once, before the training (always so without new adapters)."
    )
    ref_model: LocalPath | None = key(None, "Reference model; default: the base model.")
    ref_model_adapters: PathList = key((), "Adapters of the reference model, comma-separated.")
    ref_model_quantization_bit: Literal[4, 8] | None = key(None, "Quantise the reference model.")
    reward_model: LocalPath | None = key(
        None, "What rewards completions besides reward_funcs: folder, adapter or http address, see reward_model_type."
    )
    reward_model_adapters: PathList = key((), "Adapters of the reward model, comma-separated.")
    reward_model_quantization_bit: Literal[4, 8] | None = key(None, "Quantise the reward model.")
    reward_model_type: Literal["lora", "full", "api"] = key("lora", "What reward_model names.")

    ppo_buffer_size: int = key(1, "Batches of rollouts per PPO step.", ge=1)
    ppo_epochs: int = key(4, "Passes over each buffer.", ge=1)
    ppo_score_norm: bool = key(False, "Normalise rewards.")
    ppo_target: float = key(6.0, "Target KL of the adaptive controller.", gt=0)
    ppo_whiten_rewards: bool = key(False, "Whiten rewards before advantages are computed.")

    teacher_model: LocalPath | None = key(
        None, "Stage kd: hub id, folder or .gguf file of the model that is learnt from.", group=_KD
    )
    teacher_model_adapters: PathList = key((), "Adapters of the teacher, comma-separated.", group=_KD)
    teacher_model_quantization_bit: Literal[4, 8] | None = key(None, "Quantise the teacher.", group=_KD)
    kd_loss: Literal["forward_kl", "reverse_kl", "jsd"] = key(
        "forward_kl",
        "How far the student is from the teacher: KL(teacher, student), KL(student, teacher), or the generalised "
        "Jensen-Shannon divergence between the two.",
        group=_KD,
    )
    kd_beta: float = key(
        0.5, "Of kd_loss: jsd, the teacher's share of the mixture; 0 is the forward KL, 1 the reverse one.",
        group=_KD, ge=0, le=1,
    )  # fmt: skip
    kd_temperature: float = key(
        1.0, "What the logits of both are divided by before they are compared.", group=_KD, gt=0
    )
    kd_alpha: float = key(
        0.5, "Weight of the divergence; the cross entropy of the labels has the rest of 1.", group=_KD, gt=0, le=1
    )
