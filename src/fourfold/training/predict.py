"""Prediction: answers to the prompts of the evaluation set, written beside the answers that the data holds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fourfold.base.log import get_logger
from fourfold.dataset.batch import IGNORE_INDEX, Sample
from fourfold.dataset.loader import SampleSource
from fourfold.dataset.prepare import name_eval
from fourfold.dataset.progress import track
from fourfold.generate.huggingface import HuggingFaceEngine
from fourfold.generate.interface import sampling_of
from fourfold.models.attention import attention_for_generation
from fourfold.models.unwrap import base_model
from fourfold.training.assemble import Parts
from fourfold.training.similarity import FIGURES, segmenter, similarity

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


def generate_predictions(parts: Parts) -> dict[str, dict[str, float]]:
    """Answer every row of the evaluation sets and write `generated_predictions.jsonl`.

    Each line has `prompt`, `predict` and `label` as text.

    Returns:
        by evaluation set: how alike answers and labels are (see similarity.FIGURES), where jieba is installed, and
        how long the answers took.
    """
    path, words_of = parts.output_dir / FILE, segmenter()
    engine = HuggingFaceEngine(parts.module, parts.tokenizer, parts.renderer.stop_token_ids)
    autocast = parts.built.precision.autocast(parts.mesh.device)
    found: dict[str, dict[str, float]] = {}
    with autocast(), attention_for_generation(base_model(parts.module)), path.open("w", encoding="utf-8") as file:
        for name, source in parts.data.eval.items():
            start, scores = time.perf_counter(), list[dict[str, float]]()
            answers = _answers(parts, engine, source)
            for line in track(answers, title=f"Answering ({name_eval(name)})", total=len(source), step=1):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if words_of is not None:
                    scores.append(similarity(line["predict"], line["label"], words_of))
            seconds = time.perf_counter() - start
            found[name] = _means(scores) | {
                "runtime": round(seconds, 4),
                "samples_per_second": round(len(source) / seconds, 3),
            }
    log.info("%d predictions written to %s", sum(map(len, parts.data.eval.values())), path)
    return found


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure; none without scores."""
    if not scores:
        return {}
    return {name: math.fsum(score[name] for score in scores) / len(scores) for name in FIGURES}


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
