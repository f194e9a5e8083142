"""What a generation engine is: token ids in, token ids out. One file per engine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fourfold.config.schema import Run


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the names and defaults are the config's generating keys.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        max_length: longest prompt and answer together; if given, it takes the place of `max_new_tokens`.
        seed: makes the choice repeatable; None leaves it to torch's random state.
    """

    do_sample: bool = True
    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 50
    num_beams: int = 1
    max_new_tokens: int = 1024
    max_length: int | None = None
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    seed: int | None = None


class Engine(Protocol):
    """Generates from token ids.

    Each file of this folder has `build(run: Run, tokenizer, renderer: Renderer) -> Engine`, which loads the model;
    the file name is the value of `infer_backend`.
    """

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """The new tokens of each prompt, without the prompt and without the stop token."""
        ...

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Generator[str, None, None]:
        """The answer to one prompt as pieces of text, as they come; closing it early stops the generation."""
        ...


def policy_temperature(run: Run) -> float:
    """That the logits of a policy are divided by, which answers with the generating keys; 1 where none is sampled."""
    generation = run.generation
    return generation.temperature if generation.do_sample and generation.temperature > 0 else 1.0


def sampling_of(run: Run) -> Sampling:
    """The generating keys as an engine takes them.

    `max_length` counts only where `max_new_tokens` is not given, and `seed` only where it is: its default is for
    training, and would give each question always the same answer.
    """
    config = run.generation
    return Sampling(
        do_sample=config.do_sample,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        max_length=None if "max_new_tokens" in config.model_fields_set else config.max_length,
        repetition_penalty=config.repetition_penalty,
        length_penalty=config.length_penalty,
        seed=run.training.seed if "seed" in run.training.model_fields_set else None,
    )
