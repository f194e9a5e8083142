"""Keys of the stages that learn from rewards, ppo and grpo: where rewards come from, and how groups are learnt from."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.key import CommaFloats, CommaList, Section, key


class ReinforcementConfig(Section):
    """Reward functions, and the settings of GRPO and its variants."""

    title: ClassVar[str] = "Reinforcement"

    reward_funcs: CommaList = key(
        (),
        "Python functions that reward completions, each package.module:function or path/to/file.py:function; or "
        "exact_match, one_sentence, format_think.",
    )
    reward_weights: CommaFloats = key(
        (), "Weight of each reward: of reward_funcs in their order, then of reward_model; default: all 1."
    )

    num_generations: int = key(8, "Stage grpo: completions of each prompt, which are compared with each other.", ge=1)
    num_iterations: int = key(1, "Stage grpo: passes over the completions of a step.", ge=1)
    grpo_variant: Literal["grpo", "dapo", "dr_grpo", "gspo"] = key("grpo", "The loss of stage grpo.")
    clip_low: float = key(0.2, "How far below 1 a probability ratio counts.", ge=0, le=1)
    clip_high: float | None = key(
        None, "How far above 1 a probability ratio counts; default: 0.28 for dapo, else clip_low.", ge=0
    )
    kl_weight: float = key(0.0, "Stage grpo: weight of the KL divergence from the reference model.", ge=0)
    scale_rewards: Literal["group", "none"] | None = key(
        None,
        "What advantages are divided by: the standard deviation of the group's rewards, or nothing; default: none for "
        "dr_grpo, else group.",
        renamed={"True": "group", "False": "none"},
    )
    mask_truncated_completions: bool = key(False, "Learn nothing from completions that were cut off.")
    overlong_buffer: int | None = key(
        None, "Tokens before max_new_tokens over which the reward falls by 1 (DAPO's soft penalty).", ge=1
    )
    log_completions: int = key(4, "Completions of a logged step that are shown with their rewards.", ge=0)
