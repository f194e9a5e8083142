"""Loading the base model: from the hub, a folder or a GGUF file, or made anew, quantised if asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from fourfold.base.errors import ConfigError, ModelError
from fourfold.base.log import get_logger
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.families.composite import RENAMED, language_model_of
from fourfold.families.shared_positions import caps_scores
from fourfold.models.composite import remember_whole, whole_config
from fourfold.models.gguf_model import load_gguf_config, load_gguf_weights
from fourfold.models.patches import bars_on_terminals_only
from fourfold.models.quantize import new_quantization, settle_own_quantization, settle_quantized
from fourfold.models.shard_files import has_shards
from fourfold.models.source import explained, gguf_path, hub_options, model_name
from fourfold.models.stream import Stream, load_generation_config, open_weights, why_not_streamed
from fourfold.models.vocabulary import check_special_tokens, grows_vocabulary, resize_vocabulary
from fourfold.parallel.shares import Shares

log = get_logger(__name__)

_ATTENTION = {
    "auto": None,
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}
"""`flash_attn` -> Transformers' name; None leaves the choice to it."""


def load_config(config: ModelConfig, *, seq_len: int | None = None) -> PreTrainedConfig:
    """The Transformers config of the model, with the run's rope scaling; of one that sees, that of its language model.

    Args:
        seq_len: longest sequence that will be trained (`cutoff_len`), for the rope scaling factor; None outside
            training.
    Raises:
        ModelError: there is no such model, or it has no causal language model.
    """
    name = model_name(config)
    path = gguf_path(name)
    if path is not None:
        loaded = load_gguf_config(path)
    else:
        with explained(name, "the config"):
            loaded = AutoConfig.from_pretrained(name, **hub_options(config))
    loaded = language_model_of(loaded)
    _scale_rope(loaded, config, seq_len)
    return loaded


def load_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seq_len: int | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The base model in evaluation mode, on `device`, quantised if the config or the checkpoint says so.

    Args:
        dtype: of the weights that are not quantised, and of the computation with those that are.
        tokenizer: needed where the config adds tokens or resizes the vocabulary, so that each has a row; if given,
            the tokens that end and pad a sequence must have one.
        seq_len: see `load_config`.
        attention: Transformers' name of the attention implementation; overrides `flash_attn`.
    Raises:
        ModelError: the model cannot be loaded as asked; the message names it and the reason.
        ConfigError: settings that do not fit the model.
    """
    name = model_name(config)
    model_config, options = prepare_config(config, dtype, seq_len, attention)
    if config.train_from_scratch:
        model = _from_scratch(model_config, config, options, device)
    else:
        model = _from_weights(name, model_config, config, options, device)
    if grows_vocabulary(config):
        if tokenizer is None:
            raise TypeError("load_model needs the tokenizer where the config adds tokens to it")
        resize_vocabulary(model, tokenizer, config)
    if tokenizer is not None:
        check_special_tokens(model, tokenizer)
    remember_whole(model, config)
    settle_quantized(model)
    return model.eval()


def prepare_config(
    config: ModelConfig, dtype: torch.dtype, seq_len: int | None, attention: str | None = None
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The model's config and the options that it is built with; arguments as those of `load_model`."""
    name = model_name(config)
    model_config = load_config(config, seq_len=seq_len)
    model_config.use_cache = False
    model_config.name_or_path = name
    if config.trust_remote_code:
        log.warning("trust_remote_code: Python code that comes with %s may run on this machine.", name)
    attention = attention or _asked_attention(config) or ("eager" if caps_scores(model_config) else None)
    return model_config, {"dtype": dtype, "attn_implementation": attention}


def load_streamed(
    config: ModelConfig,
    tuning: TuningConfig,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int | None = None,
) -> tuple[PreTrainedModel, Stream] | None:
    """The base model without weights, on the meta device, and what reads each rank's part once it is split.

    Returns:
        None, after a line in the log, where a run needs the whole weights.
    Raises:
        ModelError, ConfigError: as `load_model`.
    """
    model_config, options = prepare_config(config, dtype, seq_len)
    reason = why_not_streamed(config, tuning, model_config)
    if reason is None:
        with explained(model_name(config), "the model"):
            model = _without_weights(model_config, config, options)
            found = open_weights(config, model, dtype)
        if not isinstance(found, str):
            check_special_tokens(model, tokenizer)
            remember_whole(model, config)
            return model.eval(), Stream(found)
        reason = found
    log.info("Each rank loads the whole weights, since %s.", reason)
    return None


def build_without_weights(
    model_config: PreTrainedConfig, config: ModelConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """The model with its buffers, but with parameters that take no memory (on the meta device).

    Args:
        model_config, options: as `prepare_config` gives them.
    """
    with _without_memory():
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code, **options)
    model.tie_weights()
    return model


def _without_weights(model_config: PreTrainedConfig, config: ModelConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The same, with the generation config that is published with it."""
    model = build_without_weights(model_config, config, options)
    load_generation_config(config, model)
    return model


_LARGE = 1 << 22
"""Numbers of a tensor above which a model's constructor does not get memory for it; buffers are smaller."""


class _NoLargeTensors(TorchFunctionMode):
    """New tensors that are large are made on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) and kwargs.get("device") is None:
            sizes = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
            if math.prod(size for size in sizes if isinstance(size, int)) > _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Within it, models are made without memory for their parameters; buffers are there.

    accelerate's context makes each parameter first and takes its memory away afterwards, and the experts of one layer
    may be more than a host has.
    """
    with init_empty_weights(include_buffers=False), _NoLargeTensors():
        yield


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the base model, without loading a weight."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(config), trust_remote_code=False).num_parameters()


def _from_scratch(
    model_config: PreTrainedConfig, config: ModelConfig, options: dict[str, Any], device: torch.device
) -> PreTrainedModel:
    log.info("train_from_scratch: the weights are initialised at random.")
    with torch.device(device):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code, **options)


def _from_weights(
    name: str, model_config: PreTrainedConfig, config: ModelConfig, options: dict[str, Any], device: torch.device
) -> PreTrainedModel:
    if has_shards(Path(name).expanduser()):
        return _from_shards(model_config, config, options, device)
    quantised = settle_own_quantization(model_config, config, options["dtype"])
    quantization = None if quantised else new_quantization(config, options["dtype"])
    if quantization is not None:
        options["quantization_config"] = quantization
    if quantised or quantization is not None or device.type != "cpu":
        options["device_map"] = {"": device}
    path = gguf_path(name)
    if path is None:
        with bars_on_terminals_only(), _kernel_explained(config), explained(name, "the model"):
            return read_written(name, model_config, **hub_options(config), **options)
    model_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]  # type: ignore[assignment]
    weights = load_gguf_weights(path, model_config)
    with bars_on_terminals_only(), _kernel_explained(config), explained(name, "the model"):
        return model_class.from_pretrained(None, config=model_config, state_dict=weights, **options)


def read_written(name: str, model_config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of safetensors files; of one that sees, its language model.

    Args:
        model_config: see `load_config`.
        options: of Transformers' `from_pretrained`.
    """
    if whole_config(name, **options) is None:
        return AutoModelForCausalLM.from_pretrained(name, config=model_config, use_safetensors=True, **options)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    with mock.patch.object(model_class, "_keys_to_ignore_on_load_unexpected", [".*"]):  # all other parts
        model: PreTrainedModel = model_class.from_pretrained(
            name, config=model_config, use_safetensors=True, key_mapping=dict(RENAMED), **options
        )
    vars(model).pop("_weight_conversions", None)  # by which Transformers would turn the patterns into names
    return model


def _from_shards(
    model_config: PreTrainedConfig, config: ModelConfig, options: dict[str, Any], device: torch.device
) -> PreTrainedModel:
    """The model of a sharded checkpoint, read tensor by tensor by this one process."""
    if config.quantization_bit is not None:
        raise ConfigError(
            "quantization_bit: a sharded checkpoint cannot be quantised while it is loaded. Turn it into a plain "
            "model with `fourfold export` first."
        )
    model = _without_weights(model_config, config, options)
    found = open_weights(config, model, options["dtype"])
    if isinstance(found, str):
        raise ModelError(f"model_name_or_path: {config.model_name_or_path} cannot be loaded, since {found}.")
    Stream(found).fill(model, device, Shares())
    return model


def _asked_attention(config: ModelConfig) -> str | None:
    """Transformers' name of the attention that `flash_attn` asks for; None to leave the choice to it."""
    installed = {"fa2": is_flash_attn_2_available, "fa3": is_flash_attn_3_available}.get(config.flash_attn)
    if installed is None or installed():
        return _ATTENTION[config.flash_attn]
    log.warning("flash_attn: %s is not installed here, so PyTorch's own attention is used.", config.flash_attn)
    return None


@contextmanager
def _kernel_explained(config: ModelConfig) -> Iterator[None]:
    """Say so when it is the attention kernel that cannot be had."""
    try:
        yield
    except ModelError as error:
        if config.flash_attn not in ("fa2", "fa3") or not isinstance(error.__cause__, ImportError):
            raise
        raise ConfigError(
            f"flash_attn: {config.flash_attn} cannot be used ({error.__cause__}). Install it, or use flash_attn: auto."
        ) from error


def _scale_rope(loaded: PreTrainedConfig, config: ModelConfig, seq_len: int | None) -> None:
    """Set the rope scaling, in place, so that positions up to `seq_len` fit.

    The factor is the smallest whole number that stretches the model's own context to `seq_len`, and 2 where no
    length is given.
    """
    kind = config.rope_scaling
    if kind is None:
        return
    rope = loaded.rope_parameters
    own = loaded.max_position_embeddings
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise ModelError(
            f"rope_scaling: {kind} cannot be set on a {loaded.model_type} model, whose layers have no single rotary "
            "embedding. Leave rope_scaling out."
        )
    if seq_len is not None and seq_len <= own:
        log.warning(
            "rope_scaling: cutoff_len %d is within the model's own %d positions, so nothing is scaled.", seq_len, own
        )
        return
    factor = 2.0 if seq_len is None else float(math.ceil(seq_len / own))
    scaled: dict[str, Any] = {"rope_type": kind, "rope_theta": rope["rope_theta"], "factor": factor}
    if kind in ("yarn", "llama3", "dynamic"):
        scaled["original_max_position_embeddings"] = own
    if kind == "llama3":
        scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    loaded.rope_parameters = scaled
    loaded.max_position_embeddings = int(own * factor)
    log.info("rope_scaling: %s with factor %g, for %d positions.", kind, factor, loaded.max_position_embeddings)
