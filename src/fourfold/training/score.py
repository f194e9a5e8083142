"""Scoring: the rewards of both answers to every row of the evaluation sets, in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fourfold.base.log import get_logger
from fourfold.dataset.collate import cut, pairs_of
from fourfold.dataset.loader import SampleSource
from fourfold.dataset.prepare import name_eval
from fourfold.dataset.progress import track
from fourfold.parallel.whole import everyone
from fourfold.training.assemble import Parts
from fourfold.training.predict import FILE

log = get_logger(__name__)


def score_pairs(parts: Parts) -> None:
    """Write `generated_predictions.jsonl`: for each row, in its order, `chosen` and `rejected`; every rank must call.

    The rewards are written with all their digits. Data-parallel ranks share the rows.
    """
    lines: list[str] = []
    for name, source in parts.data.eval.items():
        rows = _score(parts, source)
        if parts.mesh.rank == 0:
            rows = track(rows, title=f"Scoring ({name_eval(name)})", total=len(source), step=1)
        lines += [json.dumps({"chosen": chosen, "rejected": rejected}) for chosen, rejected in rows]
    if parts.mesh.rank == 0:
        path = parts.output_dir / FILE
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        log.info("Rewards of %d pairs written to %s", len(lines), path)
    parts.mesh.wait()


def _score(parts: Parts, source: SampleSource) -> Iterator[tuple[float, float]]:
    """Rewards of each row's chosen and rejected answer, on every rank."""
    step, ranks, rank = parts.step(), parts.mesh.layout.dp, parts.mesh.dp_rank
    size = parts.run.training.per_device_eval_batch_size * ranks
    for first in range(0, len(source), size):
        numbers = range(first, min(first + size, len(source)))
        batches = step.fill(cut([source[number] for number in numbers[rank::ranks]], parts.policy))
        own: dict[int, tuple[float, float]] = {}
        for batch, values in zip(batches, step.document_values(batches), strict=True):
            for chosen, rejected in pairs_of(batch):
                own[batch.samples[chosen][0]] = float(values[chosen]), float(values[rejected])
        found = {number: pair for theirs in everyone(own) for number, pair in theirs.items()}
        yield from (found[number] for number in numbers)
