"""The place of a vLLM engine; until there is one, a clear refusal."""

from __future__ import annotations

from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from fourfold.base.errors import ConfigError
from fourfold.config.schema import Run
from fourfold.dataset.render import Renderer


def build(run: Run, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> NoReturn:
    """Refuses.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "infer_backend: 'vllm' is not supported yet. Use infer_backend: huggingface, or export the model with "
        "`fourfold export` and serve the folder with vLLM itself."
    )
