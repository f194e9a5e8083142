"""Keys that are given and have no effect beside the others: one line each for the log."""

from __future__ import annotations

from collections.abc import Iterator

from fourfold.config.rules import Verb
from fourfold.config.schema import Run

_NO_REFERENCE = ("orpo", "simpo")
"""Values of pref_loss that compare with no reference."""


def idle_keys(run: Run, verb: Verb | None) -> Iterator[str]:
    """A line for every key whose value changes nothing in this run."""
    if not run.model.use_fast_tokenizer:
        yield "use_fast_tokenizer: false changes nothing; Transformers 5 has one tokenizer for each model"
    if verb == "train" and run.model.infer_backend == "vllm":
        yield "infer_backend: 'vllm' changes nothing in training, which answers by an engine of its own"
    yield from _reference(run)


def _reference(run: Run) -> Iterator[str]:
    keys = run.preference
    if keys.ref_model is None:
        given = {
            "ref_model_adapters": keys.ref_model_adapters,
            "ref_model_quantization_bit": keys.ref_model_quantization_bit,
        }
        for name, value in given.items():
            if value:
                yield f"{name}: changes nothing without ref_model"
    elif run.training.stage == "dpo" and keys.pref_loss in _NO_REFERENCE:
        yield f"ref_model: changes nothing; pref_loss: {keys.pref_loss} has no reference"
