"""Keys of text generation: chat and prediction."""

from __future__ import annotations

from typing import ClassVar

from fourfold.config.key import Section, key


class GenerationConfig(Section):
    """How the next token is chosen, and when to stop."""

    title: ClassVar[str] = "Generation"

    do_sample: bool = key(True, "Sample; false takes the most likely token.")
    temperature: float = key(0.95, "Flattens (above 1) or sharpens (below 1) the distribution.", ge=0)
    top_p: float = key(0.7, "Sample from the smallest set of tokens whose probabilities sum to this.", gt=0, le=1)
    top_k: int = key(50, "Sample from this many most likely tokens; 0 takes all.", ge=0)
    num_beams: int = key(1, "Beams of beam search; 1 means none.", ge=1)
    max_length: int | None = key(
        None, "Longest prompt and answer together, in tokens; max_new_tokens goes before it.", ge=1
    )
    max_new_tokens: int = key(1024, "Longest answer, in tokens.", ge=1)
    repetition_penalty: float = key(1.0, "Above 1 makes tokens that have occurred less likely.", gt=0)
    length_penalty: float = key(1.0, "Beam search: above 0 favours long answers, below 0 short ones.")
    skip_special_tokens: bool = key(True, "Leave special tokens out of the text.")
    eval_num_beams: int | None = key(None, "Beams while predicting; default: num_beams.", ge=1)
