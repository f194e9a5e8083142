"""From a config to something that answers: model, renderer, engine and sampling."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fourfold.base import registry
from fourfold.config.schema import Run
from fourfold.dataset.render import Renderer
from fourfold.generate.interface import Engine, Sampling, sampling_of
from fourfold.models.renderer import load_renderer

_ENGINES = "fourfold.generate"


@dataclass(frozen=True, slots=True)
class Speaker:
    """A loaded model, ready to answer."""

    engine: Engine
    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling


def load_speaker(run: Run) -> Speaker:
    """Load what a config names.

    Raises:
        ConfigError: keys that contradict each other or this machine, an engine that is not supported.
        ModelError: a model or adapter that cannot be loaded.
    """
    engine_module = registry.load(_ENGINES, run.model.infer_backend, key="infer_backend")
    tokenizer, renderer = load_renderer(run)
    return Speaker(engine_module.build(run, tokenizer, renderer), renderer, tokenizer, sampling_of(run))
