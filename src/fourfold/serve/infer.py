"""Answers to a list of questions, without a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from fourfold.config.schema import Run
from fourfold.dataset.rows import Message
from fourfold.serve.speaker import load_speaker


def answer(run: Run, questions: Sequence[str]) -> list[str]:
    """What the model of a config answers to each question, asked alone, with the config's system prompt.

    Raises:
        ConfigError: keys that contradict each other or this machine.
        ModelError: a model or adapter that cannot be loaded.
    """
    if not questions:
        return []
    speaker = load_speaker(run)
    prompts = [speaker.renderer.encode_prompt([Message.of("user", question)]) for question in questions]
    answers = speaker.engine.generate(prompts, speaker.sampling)
    skip = run.generation.skip_special_tokens
    return [str(speaker.tokenizer.decode(tokens, skip_special_tokens=skip)) for tokens in answers]
