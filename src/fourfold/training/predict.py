"""Prediction: answers to the prompts of the evaluation set, written beside the answers that the data holds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

from fourfold.base.log import get_logger
from fourfold.dataset.batch import IGNORE_INDEX, Sample
from fourfold.dataset.loader import SampleSource
from fourfold.generate.huggingface import HuggingFaceEngine
from fourfold.generate.interface import sampling_of
from fourfold.models.attention import attention_for_generation
from fourfold.models.unwrap import base_model
from fourfold.training.assemble import Parts

log = get_logger(__name__)

FILE = "generated_predictions.jsonl"


def split_last_answer(sample: Sample) -> tuple[list[int], list[int]]:
    """Prompt and answer of a sample: the tokens before its last trained span, and that span."""
    example = next(iter(sample.sequences.values()))
    trained = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    stop = start = trained[-1] + 1
    while start > 0 and example.labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return example.input_ids[:start], example.input_ids[start:stop]


def generate_predictions(parts: Parts) -> dict[str, float]:
    """Answer every row of the evaluation sets and write `generated_predictions.jsonl`.

    Each line has `prompt`, `predict` and `label` as text.
    """
    start, count = time.perf_counter(), 0
    path = parts.output_dir / FILE
    engine = HuggingFaceEngine(parts.module, parts.tokenizer, parts.renderer.stop_token_ids)
    autocast = parts.precision.autocast(parts.mesh.device)
    with autocast(), attention_for_generation(base_model(parts.module)), path.open("w", encoding="utf-8") as file:
        for source in parts.data.eval.values():
            for line in _answers(parts, engine, source):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    seconds = time.perf_counter() - start
    log.info("%d predictions written to %s", count, path)
    return {"predict_runtime": round(seconds, 4), "predict_samples_per_second": round(count / seconds, 3)}


def _answers(parts: Parts, engine: HuggingFaceEngine, source: SampleSource) -> Iterator[dict[str, str]]:
    sampling = sampling_of(parts.run)
    sampling = replace(sampling, num_beams=parts.run.generation.eval_num_beams or sampling.num_beams)
    size = parts.run.training.per_device_eval_batch_size
    decode = parts.tokenizer.decode
    for first in range(0, len(source), size):
        pairs = [split_last_answer(source[i]) for i in range(first, min(first + size, len(source)))]
        generated = engine.generate([prompt for prompt, _ in pairs], sampling)
        for (prompt, label), answer in zip(pairs, generated, strict=True):
            yield {
                "prompt": str(decode(prompt, skip_special_tokens=False)),
                "predict": str(decode(answer, skip_special_tokens=True)),
                "label": str(decode(label, skip_special_tokens=True)),
            }
