"""Checks across the keys of rewards and of the stages that learn from them; `rules.py` runs them."""

from __future__ import annotations

from collections.abc import Iterator

from fourfold.config.schema import Run


def reward_model(run: Run) -> Iterator[str]:
    """An address goes with reward_model_type api, and a folder with the others."""
    asked = run.preference
    if asked.reward_model is None:
        return
    address = asked.reward_model.startswith(("http://", "https://"))
    if asked.reward_model_type == "api" and not address:
        yield (
            f"reward_model: {asked.reward_model} is no address, but reward_model_type is api. Give one that begins "
            "with http:// or https://, or use reward_model_type: full or lora."
        )
    if address and asked.reward_model_type != "api":
        yield (
            f"reward_model: {asked.reward_model} is an address, but reward_model_type is {asked.reward_model_type}. "
            "Use reward_model_type: api."
        )


def reward_weights(run: Run) -> Iterator[str]:
    """As many weights as rewards."""
    weights = run.reinforcement.reward_weights
    names = [*run.reinforcement.reward_funcs, *(["reward_model"] if run.preference.reward_model else [])]
    if weights and len(weights) != len(names):
        listed = f" ({', '.join(names)})" if names else ""
        yield f"reward_weights: has {len(weights)} values for {len(names)} rewards{listed}. Give one for each, or none."


def groups(run: Run) -> Iterator[str]:
    """GRPO compares the completions of a prompt with each other."""
    if run.training.stage == "grpo" and run.reinforcement.num_generations == 1:
        yield "num_generations: 1 leaves nothing to compare a completion with. Use at least 2."


def overlong(run: Run) -> Iterator[str]:
    """The soft penalty begins within the longest answer."""
    buffer, longest = run.reinforcement.overlong_buffer, run.generation.max_new_tokens
    if buffer is not None and buffer > longest:
        yield f"overlong_buffer: {buffer} is longer than max_new_tokens ({longest}). Use less, or null for no penalty."


def needs_reward(run: Run) -> Iterator[str]:
    """What stages ppo and grpo cannot do without."""
    stage = run.training.stage
    if stage in ("ppo", "grpo") and not (run.reinforcement.reward_funcs or run.preference.reward_model):
        yield f"reward_funcs: stage {stage} needs a reward. Give reward_funcs, or reward_model."
