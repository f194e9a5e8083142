"""Which base model an adapter belongs to: a cheap fingerprint of the weights as they lie in their files.

A few values of every tensor are read from the files, rounded to bf16 and hashed with the names and shapes. So the
fingerprint does not depend on the dtype that a run loads the model in, on how the files are sharded, or on whether
the same weights lie in safetensors or in a GGUF file. The head is left out, since tied models may or may not store
it. Quantised files keep only embeddings and one-dimensional tensors in full; those have a hash of their own, which
is what a quantised and a plain checkpoint of the same model have in common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fourfold.base.errors import ModelError
from fourfold.base.log import get_logger
from fourfold.config.model import ModelConfig
from fourfold.models.gguf_model import sample_gguf_weights
from fourfold.models.sample import COLUMNS, sample_rows
from fourfold.models.source import fetch_file, gguf_path, model_name

log = get_logger(__name__)

FILE_NAME = "fourfold.json"
"""Lies beside the adapter's own files; PEFT and others do not mind it."""

_FORMAT_VERSION = 1

Sample = tuple[str, tuple[int, ...], Tensor]
"""Name and shape of a tensor, and a few of its values."""


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which model an adapter was trained on.

    Attributes:
        name: `model_name_or_path` of that run, for messages.
        weights: hash over all tensors; "" for a checkpoint that is quantised.
        unquantised: hash over the tensors that quantisation leaves alone.
        merged: adapters that were merged into the base before, in order.
    """

    name: str
    weights: str
    unquantised: str
    merged: tuple[str, ...] = ()

    def same_weights(self, other: BaseIdentity) -> bool:
        """Whether both are fingerprints of the same base."""
        if self.weights and other.weights:
            return self.weights == other.weights
        return self.unquantised == other.unquantised


def identify(config: ModelConfig, merged: tuple[str, ...] = ()) -> BaseIdentity | None:
    """The fingerprint of the base model; None if its weights are made anew or lie in no file that can be sampled.

    Reads a few kilobytes of every tensor, well under a second for most models.

    Args:
        merged: adapters that the run merges into the base.
    """
    if config.train_from_scratch:
        return None
    name = model_name(config)
    path = gguf_path(name)
    samples: Iterator[Sample] = (
        sample_gguf_weights(path) if path is not None else _sample_files(_weight_files(name, config))
    )
    whole, common = hashlib.sha256(), hashlib.sha256()
    quantised = False
    count = 0
    for tensor_name, shape, values in samples:
        if tensor_name.startswith("lm_head."):
            continue
        count += 1
        quantised = quantised or not values.is_floating_point()
        content = f"{tensor_name}{list(shape)}".encode() + values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        whole.update(content)
        if _left_alone(tensor_name, shape):
            common.update(content)
    if not count:
        log.warning(
            "model_name_or_path: the weights of %s cannot be told apart from others, so that adapters and checkpoints "
            "of another model are not refused.",
            name,
        )
        return None
    return BaseIdentity(name, "" if quantised else whole.hexdigest(), common.hexdigest(), merged)


def _left_alone(name: str, shape: tuple[int, ...]) -> bool:
    """Whether quantisation leaves a tensor as it is: norms, biases and embeddings, but no scales or code books."""
    return name.endswith((".weight", ".bias")) and (len(shape) == 1 or "embed" in name)


def _weight_files(name: str, config: ModelConfig) -> list[Path]:
    """The safetensors files of a folder or a hub id, sorted; empty if there are none."""
    index = fetch_file(name, SAFE_WEIGHTS_INDEX_NAME, config)
    if index is None:
        single = fetch_file(name, SAFE_WEIGHTS_NAME, config)
        return [] if single is None else [single]
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [path for path in (fetch_file(name, shard, config) for shard in shards) if path is not None]


def _sample_files(files: list[Path]) -> Iterator[Sample]:
    """Samples of all tensors of safetensors files, in the order of their names."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name in sorted(where):
            view = where[name].get_slice(name)
            shape = tuple(view.get_shape())
            if len(shape) == 1:
                yield name, shape, view[:]
            elif shape and all(shape):
                columns = (slice(0, COLUMNS),) * (len(shape) - 1)
                rows = [view[(slice(row, row + 1), *columns)].flatten() for row in sample_rows(shape)]
                yield name, shape, torch.cat(rows)


def write_identity(folder: Path, base: BaseIdentity) -> None:
    """Write the identity beside an adapter."""
    content = {"format_version": _FORMAT_VERSION, "base": asdict(base)}
    (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_identity(adapter: str, config: ModelConfig) -> BaseIdentity | None:
    """The identity saved with an adapter, None if it was made by another program.

    Raises:
        ModelError: the file is damaged or of a newer format.
    """
    file = f"{config.adapter_folder}/{FILE_NAME}" if config.adapter_folder else FILE_NAME
    path = fetch_file(adapter, file, config)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] > _FORMAT_VERSION:
            raise ModelError(
                f"adapter_name_or_path: {path} has format_version {content['format_version']}, this Fourfold reads up "
                f"to {_FORMAT_VERSION}. Update Fourfold."
            )
        base: dict[str, Any] = content["base"]
        return BaseIdentity(base["name"], base["weights"], base["unquantised"], tuple(base["merged"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"adapter_name_or_path: {path} is damaged ({error!r}). Restore it; without it nothing is checked."
        ) from error


def check_adapter(adapter: str, config: ModelConfig, base: BaseIdentity | None, merged: tuple[str, ...]) -> None:
    """Refuse an adapter that was trained on another base model.

    Args:
        base: identity of the model that was loaded; None if it has none.
        merged: adapters merged into it before this one.
    Raises:
        ModelError: the base differs.
    """
    recorded = read_identity(adapter, config)
    if recorded is None or base is None:
        log.info("Adapter %s is used unchecked: which base weights it was trained on is not recorded.", adapter)
        return
    if not recorded.same_weights(base):
        raise ModelError(
            f"adapter_name_or_path: {adapter} was trained on {recorded.name}, whose weights are not those of "
            f"{base.name}. Set model_name_or_path to that model, or use an adapter of this one."
        )
    if len(recorded.merged) != len(merged):
        log.warning(
            "adapter_name_or_path: %s was trained on top of %s, now it is used on top of %s. List the adapters in the "
            "order in which they were trained.",
            adapter,
            ", ".join(recorded.merged) or "the bare base model",
            ", ".join(merged) or "the bare base model",
        )
