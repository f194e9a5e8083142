"""Writing a tuned model in the form that Transformers and PEFT read."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel | PeftModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write the adapter, or the whole model, and the tokenizer to `folder`, as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
