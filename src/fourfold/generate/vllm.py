"""The place of a vLLM engine; until there is one, a clear refusal."""

from __future__ import annotations

from typing import Any, NoReturn

from fourfold.base.errors import ConfigError


def build(*_: Any, **__: Any) -> NoReturn:
    """Refuses.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "infer_backend: 'vllm' is not supported yet. Use infer_backend: huggingface, or export the model with "
        "`fourfold export` and serve the folder with vLLM itself."
    )
