"""The tokenizer and the renderer of a run; imports no model, so that looking at data stays quick."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fourfold.config.data import DataConfig
from fourfold.config.schema import Run
from fourfold.dataset.render import Renderer
from fourfold.dataset.special_tokens import settle_special_tokens
from fourfold.dataset.stage_rows import row_kind
from fourfold.dataset.template import AUTO, load_template
from fourfold.models.tokenizer import load_tokenizer

_NO_TEMPLATE = "empty"
"""The template that adds nothing to a text."""


def load_renderer(run: Run) -> tuple[PreTrainedTokenizerBase, Renderer]:
    """The tokenizer, with the template's special tokens settled, and the renderer on it.

    Plain text is not rendered, so a stage of plain text takes a tokenizer without a chat template as it is.

    Raises:
        ConfigError: no such template or tool format, or `auto` and the tokenizer has no chat template, which the
            stage needs.
        ModelError: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(run.model)
    data = run.data
    if data.template == AUTO and tokenizer.chat_template is None and row_kind(run.training.stage) == "text":
        data = data.model_copy(update={"template": _NO_TEMPLATE})
    return tokenizer, make_renderer(data, tokenizer)


def make_renderer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer of a config; settles the template's special tokens in `tokenizer`.

    Raises:
        ConfigError: as `load_renderer`.
    """
    template = load_template(config.template, tokenizer)
    settle_special_tokens(template, tokenizer)
    return Renderer(
        template,
        tokenizer,
        tool_format=config.tool_format,
        default_system=config.default_system,
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
    )
