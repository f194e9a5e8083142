"""Writing a tuned model in the form that Transformers and PEFT read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base.peft import PeftModel, get_peft_model_state_dict
from fourfold.models import pissa
from fourfold.models.composite import complete_adapter, complete_model, note_source, whole_of
from fourfold.models.identity import BaseIdentity, write_identity
from fourfold.models.parameters import tied_names
from fourfold.models.patches import bars_on_terminals_only, peft_noise_ignored
from fourfold.models.unwrap import base_model
from fourfold.models.value_head import is_of_value_head, value_head_parts, value_head_state, write_value_head
from fourfold.parallel.shares import Shares
from fourfold.parallel.whole import Part, gather, parts_of

_ADAPTER_FILE = "adapter_model.safetensors"
_README = "README.md"


def save_model(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: BaseIdentity | None = None,
    dtype: torch.dtype | None = None,
    state: dict[str, Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write the adapter, or the whole model, and the tokenizer to `folder`, as safetensors.

    Args:
        base: what the adapter was trained on (`identify_base`), so that it is not used with another model.
        dtype: of the written weights of a whole model; None writes them as they are.
        state: the weights, from `gather_weights`, where the model's own are sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = value_head_state(model) if state is None else _only_value_head(state)
    write_value_head(values, folder)
    state = None if state is None else {name: tensor for name, tensor in state.items() if name not in values}
    whole = whole_of(base_model(model))
    if isinstance(model, PeftModel):
        _save_adapter(model, folder, state)
        if whole is not None:
            complete_adapter(folder, whole)
        if base is not None:
            write_identity(folder, base)
    else:
        _save_whole(model, folder, dtype, state, max_shard_size)
        if whole is not None:
            complete_model(folder, whole)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer; a generic fast one under the class name that Transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor] | None) -> None:
    if pissa.is_pissa(model):
        weights, config = pissa.converted(model)
        config.inference_mode = True
        save_file({name: tensor.cpu() for name, tensor in weights.items()}, folder / _ADAPTER_FILE, {"format": "pt"})
        config.save_pretrained(str(folder))
        return
    readme = folder / _README
    theirs = readme.read_bytes() if readme.exists() else None
    # Explicit, since "auto" looks for the base model's config on the hub to find out whether its vocabulary grew.
    with peft_noise_ignored():
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=None if state is None else {})
    if state is not None:  # PEFT would leave out what belongs to layers that this rank does not have
        save_file(state, folder / _ADAPTER_FILE, {"format": "pt"})
    if theirs is not None:  # PEFT writes its card into a page that is there already, whoever wrote that
        readme.write_bytes(theirs)


def gather_weights(model: PreTrainedModel | PeftModel, shares: Shares) -> dict[str, Tensor]:
    """The weights that `save_model` writes, whole, on the host of rank 0; nothing on the other ranks.

    Every rank of a model that is split must call.
    """
    parts = adapter_parts(model, shares) if isinstance(model, PeftModel) else model_parts(model, shares)
    parts |= value_head_parts(model, shares)
    return {name: tensor for name, tensor in gather(parts) if tensor is not None}


def _only_value_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_of_value_head(name)}


def model_parts(model: PreTrainedModel, shares: Shares) -> dict[str, Part]:
    """All weights of a whole model on this rank, by the names that they are saved under: tied ones once.

    A value head is not among them, since it is saved apart (models/value_head.py).
    """
    saved_as, parts = tied_names(model), parts_of(model, shares)
    return {saved_as.get(name, name): part for name, part in parts.items() if not is_of_value_head(name)}


def adapter_parts(model: PeftModel, shares: Shares) -> dict[str, Part]:
    """What is trained of an adapter on this rank, by the names that PEFT saves it under."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {name: part for name, part in parts_of(model, shares).items() if name in trained}
    # PEFT renames what it is given; the tensors go through it unchanged
    marks = {name: torch.empty(0) for name in parts}
    renamed = get_peft_model_state_dict(model, state_dict=marks, save_embedding_layers=False)
    by_mark = {id(mark): name for name, mark in marks.items()}
    return {saved: parts[by_mark[id(mark)]] for saved, mark in renamed.items()}


def save_frame(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write to `folder` all that a model is without its weights: configs, tokenizer, and what it is a part of."""
    _save_config(model, folder, None)
    whole = whole_of(model)
    if whole is not None and not whole.source.train_from_scratch:
        note_source(folder, whole)
    if model.generation_config is not None and model.can_generate():
        model.generation_config.save_pretrained(str(folder))
    _save_tokenizer(tokenizer, folder)


def _save_whole(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype | None,
    state: dict[str, Tensor] | None,
    max_shard_size: str,
) -> None:
    if state is None:
        state = {name: tensor for name, tensor in model.state_dict().items() if not is_of_value_head(name)}
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with bars_on_terminals_only():
        model.save_pretrained(str(folder), state_dict=state, max_shard_size=max_shard_size)
    _save_config(model, folder, dtype)


def _save_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the config as users of the saved model expect it: with the key-value cache on, and the written dtype."""
    published = copy.deepcopy(model.config)
    published.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP makes a subclass
    published.dtype = model.dtype
    published.use_cache = True
    if dtype is not None:
        published.dtype = dtype
    published.save_pretrained(str(folder))
