"""Everything that inference needs, loaded from a run's config: for chat, the API, prediction and export."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base.errors import ConfigError
from fourfold.config.model import ModelConfig
from fourfold.config.schema import Run
from fourfold.dataset.render import Renderer
from fourfold.dataset.special_tokens import settle_special_tokens
from fourfold.dataset.template import load_template
from fourfold.models.adapters import attach
from fourfold.models.load import load_config, load_model
from fourfold.models.tokenizer import load_tokenizer

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_for_inference(
    run: Run, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel | PeftModel:
    """The model in evaluation mode, with its adapters attached but the last one not merged.

    Raises:
        ConfigError: keys that contradict each other or this machine.
        ModelError: a model that cannot be loaded, or an adapter of another base model.
    """
    dtype = inference_dtype(run.model, device)
    model = load_model(run.model, dtype=dtype, device=device, tokenizer=tokenizer)
    return attach(model, run.model, run.tuning, trainable=False)


def load_renderer(run: Run) -> tuple[PreTrainedTokenizerBase, Renderer]:
    """The tokenizer, with the template's special tokens settled, and the renderer on it.

    Raises:
        ConfigError: no such template or tool format.
        ModelError: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(run.model)
    template = load_template(run.data.template, tokenizer)
    settle_special_tokens(template, tokenizer)
    return tokenizer, Renderer(
        template,
        tokenizer,
        tool_format=run.data.tool_format,
        default_system=run.data.default_system,
        enable_thinking=run.data.enable_thinking,
        preserve_thinking=run.data.preserve_thinking,
    )


def inference_device(run: Run) -> torch.device:
    """The first GPU, or the CPU where there is none or `use_cpu` says so."""
    return torch.device("cuda", 0) if torch.cuda.is_available() and not run.training.use_cpu else torch.device("cpu")


def inference_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`infer_dtype` as torch knows it.

    `auto` is the checkpoint's own; a CPU takes float32 for float16, in which it computes slowly and overflows.

    Raises:
        ConfigError: float16 is asked for on a CPU.
    """
    if config.infer_dtype == "float16" and device.type == "cpu":
        raise ConfigError("infer_dtype: float16 does not work well on a CPU. Use bfloat16, float32 or auto.")
    if config.infer_dtype != "auto":
        return _DTYPES[config.infer_dtype]
    own = load_config(config).dtype
    if not isinstance(own, torch.dtype) or not own.is_floating_point:
        return torch.float32
    return torch.float32 if own is torch.float16 and device.type == "cpu" else own
