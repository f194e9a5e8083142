"""From a config to something that answers: model, renderer, engine and sampling."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fourfold.base import registry
from fourfold.config.schema import Run
from fourfold.dataset.render import Renderer
from fourfold.generate.interface import Engine, Sampling
from fourfold.models.inference import load_renderer

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
