"""From a run's config to tokenised training and evaluation data; no process group exists yet when this runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fourfold.base.errors import ConfigError, DataError
from fourfold.base.log import get_logger
from fourfold.config.schema import Run
from fourfold.dataset.cache import cache_root, code_digest, fingerprint_of, load_or_write, tokenizer_digest
from fourfold.dataset.encode import ROLES, Encoder, EncodeSettings
from fourfold.dataset.formats.interface import RowKind
from fourfold.dataset.info import DatasetEntry, find_entries
from fourfold.dataset.mix import mix_order, split_rows
from fourfold.dataset.render import Renderer
from fourfold.dataset.sources import OpenOptions, open_source
from fourfold.dataset.storage import SampleWriter, SetStats, TokenisedDataset
from fourfold.dataset.tokenise import ChunkTokeniser, RowReaderOf
from fourfold.dataset.workers import run_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

ROW_KINDS: Mapping[str, RowKind] = {
    "pt": "text",
    "sft": "chat",
    "rm": "preference",
    "dpo": "preference",
    "kto": "kto",
    "ppo": "prompt",
}
"""Stage -> what its rows are."""


@dataclass(frozen=True)
class Prepared:
    """Tokenised data of a run.

    Attributes:
        train: the training samples; None if the run names no data set to train on.
        eval: data sets to evaluate on, by name; `""` for the only one or all of them together.
    """

    train: TokenisedDataset | None = None
    eval: Mapping[str, TokenisedDataset] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each data set, by what it is for."""
        found = {} if self.train is None else {"train": self.train.fingerprint}
        return found | {f"eval_{name}" if name else "eval": data.fingerprint for name, data in self.eval.items()}

    @property
    def fingerprint(self) -> str:
        """One fingerprint of the training data, "" without any."""
        return "" if self.train is None else self.train.fingerprint


def encode_settings(run: Run) -> EncodeSettings:
    """How rows become token sequences in this run."""
    data, kind = run.data, row_kind(run.training.stage)
    packing = data.packing if data.packing is not None else kind == "text"
    packing = (packing or data.neat_packing) and kind in ("text", "chat")
    # LLaMA-Factory takes one token off when packing is asked for in sft; so do we, for the same sequences.
    cutoff = data.cutoff_len - 1 if packing and kind == "chat" and data.cutoff_len > 1 else data.cutoff_len
    return EncodeSettings(
        kind=kind,
        cutoff_len=cutoff,
        packing=packing,
        train_on_prompt=data.train_on_prompt,
        mask_history=data.mask_history,
    )


def row_kind(stage: str) -> RowKind:
    """What the rows of a stage are.

    Raises:
        ConfigError: the stage has none known here.
    """
    if stage not in ROW_KINDS:
        raise ConfigError(f"stage: no rows are known for stage {stage!r}. Use one of: {', '.join(ROW_KINDS)}.")
    return ROW_KINDS[stage]


def prepare(run: Run, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> Prepared:
    """Tokenise the run's data, or load it from the cache.

    Args:
        tokenizer: with the special tokens of the template settled.
        renderer: of the run's template, for `tokenizer`.
    Raises:
        ConfigError: unknown data sets, entries that cannot be used, placeholders that nothing fills.
        DataError: missing or bad files, bad rows, or nothing left to train.
    """
    maker = _Maker(run, tokenizer, renderer)
    train_mix = maker.open_mix(run.data.dataset, key="dataset")
    eval_mixes = maker.open_eval_mixes()
    if train_mix is not None and run.data.val_size > 0 and not eval_mixes:
        train_mix, held_out = _split(train_mix, run.data.val_size, maker.seed)
        eval_mixes = {"": held_out}
    train = None if train_mix is None else maker.tokenise(train_mix, "train")
    evals = {name: maker.tokenise(mix, f"eval {name}".strip()) for name, mix in eval_mixes.items()}
    return Prepared(train, evals)


def _split(mix: RowReaderOf, val_size: float, seed: int) -> tuple[RowReaderOf, RowReaderOf]:
    train, held_out = split_rows(len(mix), val_size, seed)
    if len(train) == 0 or len(held_out) == 0:
        raise ConfigError(
            f"val_size: {val_size:g} of {len(mix)} rows leaves {len(train)} to train on and {len(held_out)} to evaluate"
            " on. Choose it so that both have some."
        )
    return RowReaderOf(mix.sources, mix.order[train]), RowReaderOf(mix.sources, mix.order[held_out])


class _Maker:
    """Opens and tokenises the data sets of one run."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> None:
        self.run, self.seed = run, run.training.seed
        self.encoder = Encoder(renderer, encode_settings(run))
        self._tokenizer = tokenizer
        self._shared = {
            "code": code_digest(),
            "tokenizer": tokenizer_digest(tokenizer),
            "template": [renderer.template.model_dump_json(), renderer.tools.name, renderer.default_system],
            "thinking": [renderer.enable_thinking, renderer.preserve_thinking],
        }

    def open_mix(self, names: Sequence[str], *, key: str) -> RowReaderOf | None:
        """The rows of some data sets in their order; None without names."""
        data = self.run.data
        entries = find_entries(names, data.dataset_dir, key=key)
        if not entries:
            return None
        for entry in entries:
            check_stage(entry, self.run.training.stage)
        options = OpenOptions(
            data.dataset_vars, data.max_samples, self.seed, self.run.model.cache_dir, self.run.model.hf_hub_token
        )
        sources = [open_source(entry, options) for entry in entries]
        order = mix_order([len(source) for source in sources], data.mix_strategy, data.interleave_probs, self.seed)
        return RowReaderOf(sources, order)

    def open_eval_mixes(self) -> dict[str, RowReaderOf]:
        """The rows to evaluate on, by name."""
        data = self.run.data
        groups = {name: (name,) for name in data.eval_dataset} if data.eval_on_each_dataset else {"": data.eval_dataset}
        opened = {name: self.open_mix(names, key="eval_dataset") for name, names in groups.items()}
        return {name: mix for name, mix in opened.items() if mix is not None}

    def facts(self, mix: RowReaderOf) -> dict[str, Any]:
        """Everything that decides what the samples of a mix are."""
        settings = self.encoder.settings
        return {
            **self._shared,
            "settings": {name: getattr(settings, name) for name in settings.__dataclass_fields__},
            "batch": self.run.data.preprocessing_batch_size,
            "skip_bad_rows": self.run.data.skip_bad_rows,
            "sets": [[repr(source.entry), source.digest, dict(source.filler.values)] for source in mix.sources],
            "order": fingerprint_of({"order": mix.order.tolist(), "chosen": [_listed(s.chosen) for s in mix.sources]}),
        }

    def tokenise(self, mix: RowReaderOf, purpose: str) -> TokenisedDataset:
        """The samples of a mix, from the cache if they are there."""
        facts = self.facts(mix)
        fingerprint = fingerprint_of(facts)

        def write(folder: Path) -> None:
            self._write(mix, folder, fingerprint, facts, purpose)

        folder = cache_root() / "tokenised" / fingerprint
        return load_or_write(folder, write, overwrite=self.run.data.overwrite_cache)

    def _write(self, mix: RowReaderOf, folder: Path, fingerprint: str, facts: dict[str, Any], purpose: str) -> None:
        data = self.run.data
        names = [source.entry.name for source in mix.sources]
        tokeniser = ChunkTokeniser(
            self.encoder, [source.entry for source in mix.sources], skip_bad_rows=data.skip_bad_rows
        )
        stats = {name: SetStats() for name in names}
        complaints: dict[str, str] = {}
        with SampleWriter(folder) as writer:
            chunks = run_chunks(
                mix,
                tokeniser,
                chunk_rows=data.preprocessing_batch_size,
                workers=data.preprocessing_num_workers,
                title=f"Tokenising ({purpose})",
            )
            for result in chunks:
                writer.write(result.batch)
                complaints = result.complaints | complaints
                for number, counted in result.stats.items():
                    stats[names[number]].add(counted)
            _announce(stats, complaints)
            if writer.num_samples == 0:
                raise DataError(_nothing_left(stats, self.encoder.settings, complaints))
            writer.write_meta(fingerprint, ROLES[self.encoder.settings.kind], stats, facts)


def _listed(chosen: np.ndarray | None) -> list[int] | None:
    return None if chosen is None else chosen.tolist()


def check_stage(entry: DatasetEntry, stage: str) -> None:
    """Refuse a data set whose rows are of another kind than the stage's.

    Raises:
        ConfigError: says which stages the data set is for.
    """
    kind = row_kind(stage)
    where = f"stage: data set {entry.name!r}"
    if kind == "preference" and not entry.ranking:
        raise ConfigError(
            f"{where} has no preference pairs (its entry does not say `ranking: true`), which {stage} needs."
        )
    if kind != "preference" and entry.ranking:
        raise ConfigError(f"{where} holds preference pairs, which {stage} does not train on. Use stage dpo or rm.")
    if kind == "kto" and entry.columns.kto_tag is None:
        raise ConfigError(f"{where} names no column `kto_tag` in its entry, which kto needs.")
    if kind == "chat" and entry.columns.kto_tag is not None:
        raise ConfigError(
            f"{where} holds answers tagged as good or bad, which {stage} does not train on. Use stage kto."
        )


def _announce(stats: Mapping[str, SetStats], complaints: Mapping[str, str]) -> None:
    for name, entry in stats.items():
        log.info(
            "dataset %s: %d of %d rows, %d tokens, %d trained, %d truncated.",
            name,
            entry.samples,
            entry.rows,
            entry.tokens,
            entry.targets,
            entry.truncated,
        )
        for reason, number in entry.dropped.items():
            log.warning("dataset %s: %d rows dropped (%s).", name, number, reason)
    for reason, complaint in complaints.items():
        log.warning("First row dropped for %s: %s", reason, complaint)


def _nothing_left(stats: Mapping[str, SetStats], settings: EncodeSettings, complaints: Mapping[str, str]) -> str:
    rows = sum(entry.rows for entry in stats.values())
    tokens = sum(entry.tokens for entry in stats.values())
    if settings.kind == "text" and settings.packing and tokens:
        return (
            f"cutoff_len: the {rows} rows hold {tokens} tokens, too few for one block of {settings.cutoff_len}. "
            "Lower cutoff_len, add text, or set packing: false."
        )
    reasons: dict[str, int] = {}
    for entry in stats.values():
        for reason, number in entry.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + number
    told = ", ".join(f"{number} for {reason}" for reason, number in reasons.items())
    first = next(iter(complaints.values()), "")
    return f"dataset: none of the {rows} rows of {', '.join(stats)} can be trained: dropped {told}. First: {first}."
