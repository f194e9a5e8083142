"""From a run's config to tokenised training and evaluation data; no process group exists yet when this runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.base.cache import cache_root
from fourfold.base.errors import ConfigError, DataError
from fourfold.base.log import get_logger
from fourfold.config.schema import Run
from fourfold.dataset.cache import code_digest, fingerprint_of, load_or_write, tokenizer_digest
from fourfold.dataset.encode import Encoder, EncodeSettings
from fourfold.dataset.info import DatasetEntry, find_entries
from fourfold.dataset.mix import mix_order, split_rows
from fourfold.dataset.outcome import Outcome, announce
from fourfold.dataset.progress import track
from fourfold.dataset.raw import RawMix, RawRows
from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Row
from fourfold.dataset.saved import TRAIN, is_saved, load_saved, save_marker
from fourfold.dataset.sources import OpenOptions, open_source
from fourfold.dataset.stage_rows import check_stage, row_kind
from fourfold.dataset.storage import SampleWriter, TokenisedDataset
from fourfold.dataset.stream import RowStream, SampleStream, hold_out
from fourfold.dataset.tokenise import ChunkTokeniser, find_parser
from fourfold.dataset.workers import num_workers, run_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

_Tokenise = Callable[[RawRows, str], TokenisedDataset]
"""Makes a data set of rows, under a name."""


@dataclass(frozen=True)
class Prepared:
    """Tokenised data of a run.

    Attributes:
        train: the training samples; None if the run names nothing to train on, or streams it.
        eval: data sets to evaluate on, by name; `""` for the only one or all of them together.
        stream: the training samples of a run with `streaming`.
    """

    train: TokenisedDataset | None = None
    eval: Mapping[str, TokenisedDataset] = field(default_factory=dict)
    stream: SampleStream | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each data set, by what it is for."""
        found = {name_eval(name): data.fingerprint for name, data in self.eval.items()}
        return {TRAIN: self.fingerprint, **found} if self.fingerprint else found

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the training data, "" without any."""
        source = self.train or self.stream
        return "" if source is None else source.fingerprint


def name_eval(name: str) -> str:
    """What an evaluation set is called in logs and folders."""
    return f"eval_{name}" if name else "eval"


def encode_settings(run: Run, *, answered: bool = False) -> EncodeSettings:
    """How rows become token sequences in this run.

    Args:
        answered: the model answers these rows (`predict_with_generate`), so each is a sequence of its own whose prompt
            is told apart from its answer, whatever is trained on.
    """
    data, kind = run.data, row_kind(run.training.stage)
    if answered:
        return EncodeSettings(kind, data.cutoff_len, mask_history=data.mask_history)
    packing = data.neat_packing or (data.packing if data.packing is not None else kind == "text")
    packing = packing and kind in ("text", "chat")
    # LLaMA-Factory takes one token off the cutoff of packed chats; the same sequences come out here.
    cutoff_len = max(data.cutoff_len - 1, 1) if packing and kind == "chat" else data.cutoff_len
    return EncodeSettings(kind, cutoff_len, packing, data.train_on_prompt, data.mask_history)


def prepare(run: Run, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> Prepared:
    """Tokenise the run's data, or load it from the cache or from `tokenized_path`.

    Args:
        tokenizer: with the special tokens of the template settled.
        renderer: of the run's template, for `tokenizer`.
    Raises:
        ConfigError: unknown data sets, entries that cannot be used, placeholders that nothing fills.
        DataError: missing or bad files, bad rows, or nothing left to train.
    """
    maker = _Maker(run, tokenizer, renderer)
    if run.data.tokenized_path is None:
        return maker.make(maker.cached)
    root = Path(run.data.tokenized_path)
    if run.data.streaming:
        raise ConfigError("tokenized_path: a stream is not saved. Leave out tokenized_path or streaming.")
    found = is_saved(root)
    if not found or run.data.overwrite_cache:
        load_or_write(root, maker.save, overwrite=found)
        log.info("Tokenised data saved at %s", root)
    parts = load_saved(root, maker.facts, answered=run.training.predict_with_generate)
    if found:
        for name, data in parts.items():
            announce(data.stats, name)
    train = parts.pop(TRAIN, None)
    return Prepared(train, {name.removeprefix("eval").removeprefix("_"): data for name, data in parts.items()})


def load_rows(run: Run, names: Sequence[str], stage: str) -> Iterator[Row]:
    """The parsed rows of some data sets, mixed and limited as the run says, before any tokenizer is seen.

    Raises:
        BadRow: a row is not what its format demands.
        ConfigError, DataError: as `prepare`.
    """
    mix = open_mix(run, names, stage, key="dataset")
    if mix is None:
        return
    for start in range(len(mix)):
        chunk = mix.read(start, start + 1)
        entry = mix.entries[chunk.sets[0]]
        yield find_parser(entry.formatting)(chunk.rows[0], entry, row_kind(stage))


def open_options(run: Run) -> OpenOptions:
    """How the run's data sets are opened."""
    data, model = run.data, run.model
    return OpenOptions(
        data.dataset_vars,
        data.max_samples,
        run.training.seed,
        model.cache_dir,
        token=model.hf_hub_token,
        ms_token=model.ms_hub_token,
    )


def open_entries(run: Run, names: Sequence[str], stage: str, *, key: str) -> list[DatasetEntry]:
    """The entries of some data sets, checked to be of use for a stage."""
    entries = find_entries(names, run.data.dataset_dir, key=key)
    for entry in entries:
        check_stage(entry, stage)
    return entries


def open_mix(run: Run, names: Sequence[str], stage: str, *, key: str) -> RawMix | None:
    """The rows of some data sets in the order in which they are used; None without names.

    Args:
        key: the config key that names them, for messages.
    """
    entries = open_entries(run, names, stage, key=key)
    if not entries:
        return None
    sources = [open_source(entry, open_options(run)) for entry in entries]
    data = run.data
    order = mix_order([len(s) for s in sources], data.mix_strategy, data.interleave_probs, run.training.seed)
    return RawMix(sources, order)


class _Maker:
    """Opens and tokenises the data sets of one run."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> None:
        self.run = run
        self._trained = Encoder(renderer, encode_settings(run))
        answered = run.training.predict_with_generate
        self._evaluated = Encoder(renderer, encode_settings(run, answered=True)) if answered else self._trained
        self._made_with = {
            "code": code_digest(),
            "tokenizer": tokenizer_digest(tokenizer),
            "template": renderer.fingerprint,
            "preprocessing_batch_size": run.data.preprocessing_batch_size,
            "skip_bad_rows": run.data.skip_bad_rows,
        }

    def encoder(self, name: str) -> Encoder:
        """What encodes the rows of a data set."""
        return self._trained if name == TRAIN else self._evaluated

    def facts(self, name: str, rows: RawRows | None = None) -> dict[str, Any]:
        """Everything that decides what the samples of some rows are, used under a name."""
        made_with = {**self._made_with, "settings": asdict(self.encoder(name).settings)}
        return {**made_with, **({} if rows is None else rows.facts())}

    def make(self, tokenise: _Tokenise) -> Prepared:
        """All data sets of the run."""
        run, data = self.run, self.run.data
        evals: dict[str, RawRows] = {}
        groups = {name: (name,) for name in data.eval_dataset} if data.eval_on_each_dataset else {"": data.eval_dataset}
        for name, names in groups.items():
            mix = open_mix(run, names, run.training.stage, key="eval_dataset")
            if mix is not None:
                evals[name] = mix
        holds_out = data.val_size > 0 and not evals
        train: RawRows | None = None
        stream = None
        if data.streaming and data.dataset:
            stream, held_out = self._stream(int(data.val_size) if holds_out else 0)
            if held_out is not None:
                evals[""] = held_out
        else:
            train = mix = open_mix(run, data.dataset, run.training.stage, key="dataset")
            if mix is not None and holds_out:
                train, evals[""] = _split(mix, data.val_size, run.training.seed)
        made = None if train is None else tokenise(train, TRAIN)
        return Prepared(made, {name: tokenise(rows, name_eval(name)) for name, rows in evals.items()}, stream)

    def cached(self, rows: RawRows, name: str) -> TokenisedDataset:
        """The samples of some rows, from the cache if they are there."""
        folder = cache_root() / "tokenised" / fingerprint_of(self.facts(name, rows))
        found = folder.exists() and not self.run.data.overwrite_cache
        load_or_write(folder, lambda to: self._write(rows, to, name), overwrite=self.run.data.overwrite_cache)
        data = TokenisedDataset(folder)
        if found:
            announce(data.stats, name)
        return data

    def save(self, root: Path) -> None:
        """Tokenise everything into a folder for `tokenized_path`."""

        def tokenise(rows: RawRows, name: str) -> TokenisedDataset:
            (root / name).mkdir()
            self._write(rows, root / name, name)
            return TokenisedDataset(root / name)

        self.make(tokenise)
        save_marker(root)

    def _tokeniser(self, entries: Sequence[DatasetEntry], name: str) -> ChunkTokeniser:
        return ChunkTokeniser(self.encoder(name), entries, skip_bad_rows=self.run.data.skip_bad_rows)

    def _write(self, rows: RawRows, folder: Path, name: str) -> None:
        """Tokenise rows into an empty folder."""
        data = self.run.data
        tokeniser = self._tokeniser(rows.entries, name)
        outcome = Outcome([entry.name for entry in rows.entries])
        chunk_rows = data.preprocessing_batch_size
        workers = num_workers(len(rows), data.preprocessing_num_workers)
        results = run_chunks(rows, tokeniser, chunk_rows=chunk_rows, workers=workers)
        facts = self.facts(name, rows)
        with SampleWriter(folder) as writer:
            for result in track(results, title=f"Tokenising ({name})", total=len(rows), step=chunk_rows):
                writer.write(result.batch)
                outcome.add(result)
            outcome.announce(name)
            if writer.num_samples == 0:
                raise DataError(outcome.nothing_left(self.encoder(name).settings))
        writer.write_meta(fingerprint_of(facts), tokeniser.roles, outcome.stats, facts)

    def _stream(self, num_held_out: int) -> tuple[SampleStream, RawRows | None]:
        """The stream of the training data, and the rows set aside from its beginning to evaluate on."""
        run, data, training = self.run, self.run.data, self.run.training
        if 0 < data.val_size < 1:
            raise ConfigError(
                f"val_size: {data.val_size:g} is a share, but a stream has no known length. Give a number of rows."
            )
        entries = open_entries(run, data.dataset, training.stage, key="dataset")
        rows = RowStream(entries, open_options(run), data.mix_strategy, data.interleave_probs, training.seed)
        facts = {
            **self.facts(TRAIN),
            "streamed": [repr(entry) for entry in entries],
            "held_out": num_held_out,
            "mix": [data.mix_strategy, list(data.interleave_probs)],
            "buffer_size": data.buffer_size,
        }
        stream = SampleStream(
            rows,
            self._tokeniser(entries, TRAIN),
            fingerprint=fingerprint_of(facts),
            chunk_rows=data.preprocessing_batch_size,
            buffer_size=0 if training.disable_shuffling else data.buffer_size,
            seed=training.seed if training.data_seed is None else training.data_seed,
            held_out=num_held_out,
        )
        return stream, hold_out(rows, num_held_out) if num_held_out else None


def _split(mix: RawMix, val_size: float, seed: int) -> tuple[RawMix, RawMix]:
    train, held_out = split_rows(len(mix), val_size, seed)
    if len(train) == 0 or len(held_out) == 0:
        raise ConfigError(
            f"val_size: {val_size:g} of {len(mix)} rows leaves {len(train)} to train on and {len(held_out)} to evaluate"
            " on. Choose it so that both have some."
        )
    return RawMix(mix.sources, mix.order[train]), RawMix(mix.sources, mix.order[held_out])
