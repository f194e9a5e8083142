"""What will be trained, as text: counts, lengths, and the first example token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fourfold.base.errors import ConfigError
from fourfold.config.schema import Run
from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.prepare import Prepared, prepare
from fourfold.dataset.render import Renderer
from fourfold.dataset.set_stats import SetStats
from fourfold.dataset.storage import TokenisedDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BAR_WIDTH = 40
_MAX_BINS = 10


def report(run: Run, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> str:
    """Tokenise the run's data and describe it.

    Raises:
        ConfigError, DataError: as `prepare`.
    """
    prepared = prepare(run, tokenizer, renderer)
    return describe(prepared, tokenizer)


def describe(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe tokenised data.

    Raises:
        ConfigError: there is none.
    """
    lines: list[str] = []
    if prepared.train is not None:
        lines += _data_set("Training data", prepared.train)
    if prepared.stream is not None:
        lines.append("Training data: streamed, so nothing is counted.")
    for name, data in prepared.eval.items():
        lines += ["", *_data_set(f"Evaluation data {name}".rstrip(), data)]
    first = _first_sample(prepared)
    return "\n".join([*lines, "", *_example(first, tokenizer)])


def _first_sample(prepared: Prepared) -> Sample:
    if prepared.train is not None:
        return prepared.train[0]
    if prepared.stream is not None:
        return next(iter(prepared.stream))
    if not prepared.eval:
        raise ConfigError("dataset: no data set is named. Name one of dataset_info.json.")
    return next(iter(prepared.eval.values()))[0]


def _data_set(title: str, data: TokenisedDataset) -> Iterator[str]:
    yield f"{title}: {len(data):,} samples, {int(data.lengths.sum()):,} tokens, {int(data.num_targets.sum()):,} trained"
    yield ""
    yield from _counts(data.stats)
    lengths = data.document_lengths()
    what = "sequences" if len(lengths) == len(data) else "documents, several to a sample"
    yield ""
    yield f"Lengths of {len(lengths):,} {what} (tokens): {_quantiles(lengths)}"
    yield from _histogram(lengths)


def _counts(stats: Mapping[str, SetStats]) -> Iterator[str]:
    width = max(len("data set"), *(len(name) for name in stats))
    heads = ("rows", "used", "tokens", "trained", "truncated", "dropped")
    yield f"{'data set':<{width}}" + "".join(f"{head:>13}" for head in heads)
    for name, entry in stats.items():
        dropped = sum(entry.dropped.values())
        numbers = (entry.rows, entry.samples, entry.tokens, entry.targets, entry.truncated, dropped)
        yield f"{name:<{width}}" + "".join(f"{number:>13,}" for number in numbers)
        for reason, number in entry.dropped.items():
            yield f"  dropped, {reason}: {number:,}"


def _quantiles(lengths: np.ndarray) -> str:
    least, half, most_of, most = np.quantile(lengths, [0, 0.5, 0.95, 1]).astype(int)
    return f"least {least:,}, median {half:,}, 95 % below {most_of:,}, most {most:,}"


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    edges = _bin_edges(int(lengths.min()), int(lengths.max()))
    counts, _ = np.histogram(lengths, bins=edges)
    digits = len(f"{edges[-1] - 1:,}")
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * round(_BAR_WIDTH * int(count) / int(counts.max()))
        yield f"  {low:>{digits},} to {high - 1:>{digits},}  {int(count):>9,}  {bar}".rstrip()


def _bin_edges(least: int, most: int) -> list[int]:
    """Round edges of at most _MAX_BINS bins that hold all lengths."""
    step = next(s for k in range(12) for s in (10**k, 2 * 10**k, 5 * 10**k) if most // s - least // s < _MAX_BINS)
    return list(range(least // step * step, most + step + 1, step))


def _example(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield "First example"
    for role, example in sample.sequences.items():
        yield from _sequence(f"{role}_" if role else "", example, tokenizer)
    for name, value in sample.extras.items():
        yield f"{name}: {value:g}"


def _sequence(prefix: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if len(example.documents) > 1:
        yield f"{prefix}documents: {list(example.documents)}"
    yield f"{prefix}input_ids:"
    yield f"{example.input_ids}"
    yield f"{prefix}text:"
    yield _decode(example.input_ids, tokenizer)
    yield f"{prefix}label_ids:"
    yield f"{example.labels}"
    yield f"{prefix}labels:"
    yield _decode([label for label in example.labels if label != IGNORE_INDEX], tokenizer)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)
    return text
