"""Log-probabilities of the data under a reference model, computed once before the training and kept in a file.

So no second copy of the weights is held while training. The reference is the model that the training starts from, or
another one (`ref_model`), which is loaded for the time of the computation, split as the trained one is.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.config.second import REFERENCE_KEYS, reference_run
from fourfold.dataset.collate import cut, filler, pairs_of
from fourfold.dataset.encoded import ROLES
from fourfold.dataset.prepare import name_eval
from fourfold.dataset.progress import track
from fourfold.dataset.saved import TRAIN
from fourfold.dataset.stage_rows import row_kind
from fourfold.dataset.storage import TokenisedDataset
from fourfold.losses.documents import begins_as_base, reference_name
from fourfold.losses.token import TokenLoss
from fourfold.parallel.step import Step
from fourfold.training.assemble import Parts
from fourfold.training.frozen import build_frozen, named_as

log = get_logger(__name__)

FILE = "reference_logps.npz"
_SAMPLES_A_PASS = 16
"""Samples of a data-parallel rank that are computed together."""


def add_reference(parts: Parts) -> None:
    """Give every sample of the run's data its log-probabilities under the reference, where the stage stores them.

    Raises:
        ConfigError: the data are streamed.
        ModelError: a reference model that cannot be loaded.
    """
    if not getattr(parts.objective, "stored", False):
        return
    if parts.data.stream is not None:
        raise ConfigError(
            "streaming: the reference's log-probabilities are computed before the training, over all data. Set "
            "streaming: false, or use LoRA without ref_model, which needs none of it."
        )
    sets = {name_eval(name): data for name, data in parts.data.eval.items()}
    if parts.data.train is not None:
        sets[TRAIN] = parts.data.train
    file, made_with = parts.output_dir / FILE, _fingerprint(parts, sets)
    tables = _read(file, made_with)
    if tables is None:
        with _asking(parts) as step:
            tables = {name: _compute(parts, data, step, name) for name, data in sets.items()}
            step.rest()
        parts.mesh.wait()
        if parts.mesh.rank == 0:
            _write(file, made_with, tables)
    roles = ROLES[row_kind(parts.run.training.stage)]
    for name, data in sets.items():
        for column, role in enumerate(roles):
            data.add_numbers(reference_name(role), tables[name][:, column])


def _fingerprint(parts: Parts, sets: dict[str, TokenisedDataset]) -> str:
    """Of what the figures depend on."""
    run, preference = parts.run, parts.run.preference
    facts = {
        "data": {name: data.fingerprint for name, data in sorted(sets.items())},
        "model": preference.ref_model or run.model.model_name_or_path,
        "adapters": preference.ref_model_adapters if preference.ref_model else run.model.adapter_name_or_path,
        "bits": preference.ref_model_quantization_bit if preference.ref_model else run.model.quantization_bit,
        "dtype": str(parts.built.precision.compute),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(file: Path, made_with: str) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as found:
        if str(found["made_with"]) != made_with:
            return None
        log.info("Log-probabilities under the reference read from %s", file)
        return {name: found[name] for name in found.files if name != "made_with"}


def _write(file: Path, made_with: str, tables: dict[str, np.ndarray]) -> None:
    beside = file.with_name(f".{file.name}")
    with beside.open("wb") as target:
        np.savez(target, made_with=np.array(made_with), **tables)  # type: ignore[arg-type]
    beside.replace(file)
    log.info("Log-probabilities under the reference saved at %s", file)


@contextmanager
def _asking(parts: Parts) -> Iterator[Step]:
    """The engine that runs the reference."""
    preference = parts.run.preference
    if preference.ref_model is None:
        yield parts.step()
        return
    log.info("Reference model: %s", preference.ref_model)
    with named_as(REFERENCE_KEYS):
        built = build_frozen(reference_run(parts.run), parts.mesh, parts.tokenizer)
    try:
        yield built.step(TokenLoss(), lambda: filler(parts.policy))
    finally:
        del built
        gc.collect()
        if parts.mesh.device.type == "cuda":
            torch.cuda.empty_cache()


def _compute(parts: Parts, data: TokenisedDataset, step: Step, name: str) -> np.ndarray:
    """[samples, 2] fp32, on every rank."""
    table = torch.zeros(len(data), len(ROLES[row_kind(parts.run.training.stage)]))
    ranks, rank = parts.mesh.layout.dp, parts.mesh.dp_rank
    size = _SAMPLES_A_PASS * ranks
    starts = track(range(0, len(data), size), title=f"Reference ({name})", total=-(-len(data) // size), step=1)
    off = parts.run.preference.ref_model is None and begins_as_base(parts.run)
    for first in starts:
        samples = [data[i] for i in range(first, min(first + size, len(data)))[rank::ranks]]
        batches = step.fill(cut(samples, parts.policy))
        for batch, logps in zip(batches, step.document_logps(batches, reference=off), strict=True):
            on_host = logps.cpu()
            for documents in pairs_of(batch):
                table[batch.samples[documents[0]][0]] = on_host[list(documents)]
    if parts.split.reducer.data is not None:
        dist.all_reduce(table, group=parts.split.reducer.data)
    return table.numpy()
