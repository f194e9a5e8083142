"""Prediction: answers to the prompts of the evaluation set, written beside the answers that the data holds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch.distributed as dist

from fourfold.base.log import get_logger, told_elsewhere
from fourfold.dataset.batch import IGNORE_INDEX, Sample
from fourfold.dataset.loader import SampleSource
from fourfold.dataset.prepare import name_eval
from fourfold.dataset.progress import track
from fourfold.generate.huggingface import HuggingFaceEngine
from fourfold.generate.interface import Sampling, sampling_of
from fourfold.generate.rollout import RolloutEngine, can_roll_out
from fourfold.models.attention import attention_for_generation
from fourfold.models.unwrap import base_model
from fourfold.training.assemble import Parts, pad_token
from fourfold.training.similarity import FIGURES, Segmenter, segmenter, similarity

log = get_logger(__name__)

FILE = "generated_predictions.jsonl"
_BATCHES = 4
"""Batches of rows that a rank answers before it tells the others: enough that rows take the places of finished ones."""


def split_last_answer(sample: Sample) -> tuple[list[int], list[int]]:
    """Prompt and answer of a sample: the tokens before its last trained span, and that span."""
    example = next(iter(sample.sequences.values()))
    trained = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    stop = start = trained[-1] + 1
    while start > 0 and example.labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return example.input_ids[:start], example.input_ids[start:stop]


@dataclass(frozen=True, slots=True)
class _Answered:
    """A row with its answer.

    Attributes:
        line: prompt, answer (`predict`) and label as text.
        scores: how alike answer and label are (see similarity.FIGURES); None without jieba.
    """

    line: dict[str, str]
    scores: dict[str, float] | None


_Answer = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]
"""Prompts and their numbers -> the tokens of the answers, without stop tokens."""


def generate_predictions(parts: Parts) -> dict[str, dict[str, float]]:
    """Answer every row of the evaluation sets and write `generated_predictions.jsonl`; every rank must call.

    Data-parallel ranks share the rows, and the first rank writes them, in their order. Each line has `prompt`,
    `predict` and `label` as text.

    Returns:
        by evaluation set: how alike answers and labels are (see similarity.FIGURES), where jieba is installed, and
        how long the answers took.
    """
    path = parts.output_dir / FILE
    with told_elsewhere(parts.mesh.rank != 0):
        words_of = segmenter()
    answer = _engine(parts)
    found: dict[str, dict[str, float]] = {}
    first = parts.mesh.rank == 0
    with path.open("w", encoding="utf-8") if first else nullcontext() as file:
        for name, source in parts.data.eval.items():
            start, scores = time.perf_counter(), list[dict[str, float]]()
            rows = _answers(parts, answer, source, words_of)
            if first:
                rows = track(rows, title=f"Answering ({name_eval(name)})", total=len(source), step=1)
            for row in rows:
                if file is not None:
                    file.write(json.dumps(row.line, ensure_ascii=False) + "\n")
                if row.scores is not None:
                    scores.append(row.scores)
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


def _engine(parts: Parts) -> _Answer:
    """What answers: the engine of rollouts, or Transformers' own for what only that can do, with a whole model on each
    rank (training/machines.py)."""
    config = parts.run.generation
    sampling = replace(sampling_of(parts.run), num_beams=config.eval_num_beams or config.num_beams)
    stop = parts.renderer.stop_token_ids
    inner = base_model(parts.module)
    if sampling.num_beams > 1 or not can_roll_out(inner.config, type(inner)):
        return partial(_by_transformers, parts, HuggingFaceEngine(parts.module, parts.tokenizer, stop), sampling)
    longest = sampling.max_length or parts.run.data.cutoff_len + sampling.max_new_tokens
    engine = parts.built.rollouts(
        stop_token_ids=stop,
        pad_token_id=pad_token(parts.tokenizer),
        batch_tokens=parts.run.training.per_device_eval_batch_size * longest,
    )
    return partial(_by_rollouts, engine, sampling)


def _by_rollouts(
    engine: RolloutEngine, sampling: Sampling, prompts: Sequence[Sequence[int]], numbers: Sequence[int]
) -> list[list[int]]:
    found = engine.generate(prompts, sampling, keys=numbers)
    return [answer.tokens[:-1] if answer.finished else answer.tokens for answer in found]


def _by_transformers(
    parts: Parts,
    engine: HuggingFaceEngine,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
) -> list[list[int]]:
    size = parts.run.training.per_device_eval_batch_size
    found: list[list[int]] = []
    with parts.built.autocast(), attention_for_generation(base_model(parts.module)):
        for first in range(0, len(prompts), size):
            found += engine.generate(prompts[first : first + size], sampling)
    return found


def _answers(parts: Parts, answer: _Answer, source: SampleSource, words_of: Segmenter | None) -> Iterator[_Answered]:
    """Every row of a set, in order; ranks answer a portion of them at a time, and then tell each other."""
    ranks, group = parts.mesh.layout.dp, parts.split.reducer.data
    portion = parts.run.training.per_device_eval_batch_size * _BATCHES * ranks
    for first in range(0, len(source), portion):
        numbers = range(first, min(first + portion, len(source)))
        mine = numbers[parts.mesh.dp_rank :: ranks]
        pairs = [split_last_answer(source[number]) for number in mine]
        generated = answer([prompt for prompt, _ in pairs], mine)
        own = [_row(parts, *pair, tokens, words_of) for pair, tokens in zip(pairs, generated, strict=True)]
        by_rank: list[list[_Answered]] = [own]
        if group is not None:
            by_rank = [[] for _ in range(ranks)]
            dist.all_gather_object(by_rank, own, group)
        for number in range(len(numbers)):
            yield by_rank[number % ranks][number // ranks]


def _row(
    parts: Parts, prompt: Sequence[int], label: Sequence[int], answer: Sequence[int], words_of: Segmenter | None
) -> _Answered:
    def text(tokens: Sequence[int], *, skip: bool) -> str:
        return str(parts.tokenizer.decode(list(tokens), skip_special_tokens=skip))

    skip = parts.run.generation.skip_special_tokens
    line = {"prompt": text(prompt, skip=False), "predict": text(answer, skip=skip), "label": text(label, skip=skip)}
    if words_of is None:
        return _Answered(line, None)
    # As LLaMA-Factory: special tokens are no words, whatever the file shows.
    return _Answered(line, similarity(text(answer, skip=True), text(label, skip=True), words_of))
