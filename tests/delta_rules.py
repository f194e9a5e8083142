"""Transformers' own gated delta rule, to compare with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

NAME = "torch_chunk_gated_delta_rule"
Rule = Callable[..., tuple[Tensor, Tensor | None]]


@cache
def transformers_rule() -> Rule:
    """Of a copy of the module, since that of the process may have had it exchanged. Takes as many key heads as value
    heads: Transformers 5.17 has its layers repeat them, 5.24 the rule itself."""
    spec = importlib.util.find_spec(modeling_qwen3_5.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = getattr(module, NAME)

    def rule(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        query, key = (x.repeat_interleave(value.shape[2] // key.shape[2], 2) for x in (query, key))
        return own(query, key, value, *args, **kwargs)

    return rule
