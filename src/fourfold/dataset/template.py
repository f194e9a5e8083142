"""Chat templates: a Jinja body and the facts about it that rendering and training need.

A template is one file, `templates/<name>.jinja`. It begins with a comment that holds the facts as YAML between
`{#---` and `---#}`; the rest is the body, unless the facts name another template whose body it shares (`body_of`). The
body sees

- `messages`: dicts with `role` (user, assistant, function, observation) and `content`, without the system prompt;
- `system`: the system prompt with the description of the tools, or none;
- `bos_token`, `eos_token`; `add_generation_prompt`: whether to end with the opening of an assistant turn,

names its loop variable `message`, and marks with `{%- generation -%}` and `{%- endgeneration -%}` what the model
writes, and with `{%- cut -%}` where the text before and after is tokenised apart.
"""

from __future__ import annotations

import importlib.resources
import re
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fourfold.base import registry
from fourfold.base.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
_PACKAGE = "fourfold.dataset.templates"
_MARK = re.compile(r"\{%(?P<left>[-+]?)\s*(?:(?:end)?generation|cut)\s*(?P<right>[-+]?)%\}")
_FRONT_MATTER = re.compile(r"\A\{#---\n(?P<facts>.*?)\n---#\}\n?", re.DOTALL)


class TemplateFacts(BaseModel):
    """What a template says about itself.

    Attributes:
        default_system: system prompt of a conversation that has none.
        stop_words: tokens that end a turn besides the tokenizer's end-of-sequence.
        replace_eos: the first stop word takes the place of the tokenizer's end-of-sequence token.
        efficient_eos: a response is written without an end token; the end-of-sequence is the label (not the input)
            at the first token of the next prompt, and is appended once at the very end.
        tool_format: how tools are described and called (`tool_formats/<name>.jinja`).
        reasoning: the model thinks before it answers; `enable_thinking` applies.
        thought_words: what a thought begins and ends with.
        empty_thought: an empty thought where it is not the two words together.
        tool_call_words: what a tool call in a data set's text may be wrapped in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    replace_eos: bool = False
    efficient_eos: bool = False
    tool_format: str = "default"
    reasoning: bool = False
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    empty_thought: str | None = None
    tool_call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")


class Template(BaseModel):
    """A chat template.

    Attributes:
        name: its config value.
        body: Jinja source without the facts; for `auto` the tokenizer's own chat template.
        facts: what it says about itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    body: str
    facts: TemplateFacts = TemplateFacts()

    @property
    def is_auto(self) -> bool:
        """Whether this is the tokenizer's own chat template, which follows transformers' conventions, not ours."""
        return self.name == AUTO


def template_names() -> list[str]:
    """The valid values of `template:`."""
    return sorted([AUTO, *registry.names(_PACKAGE, suffix=".jinja")])


def parse_template(name: str, source: str) -> Template:
    """A template from the text of its file.

    Raises:
        ConfigError: the facts at its head are not valid.
    """
    match = _FRONT_MATTER.match(source)
    try:
        body = source[match.end() :] if match else source
        facts = dict(yaml.safe_load(match["facts"]) if match else {})
        if "body_of" in facts:
            body = parse_template(str(facts["body_of"]), _read(str(facts.pop("body_of")))).body
        # Only so can they be taken out again without a change of the white space around them (see export_template).
        if any(mark["left"] != "-" or mark["right"] != "-" for mark in _MARK.finditer(body)):
            raise ValueError("a mark does not trim the space around it; write {%- generation -%} and {%- cut -%}")
        return Template(name=name, body=body, facts=TemplateFacts.model_validate(facts))
    except (yaml.YAMLError, ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"template: {name}.jinja is not valid: {error}. Correct the file.") from error


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a config value; `auto` is the tokenizer's own.

    Raises:
        ConfigError: no such template, or `auto` and the tokenizer has none.
    """
    if name == AUTO:
        return Template(name=AUTO, body=_own_template(tokenizer))
    return parse_template(name, _read(name))


def _read(name: str) -> str:
    valid = template_names()
    if name not in valid or name == AUTO:
        raise ConfigError(registry.unknown("template", name, valid))
    return importlib.resources.files(_PACKAGE).joinpath(f"{name}.jinja").read_text(encoding="utf-8")


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several named ones
        own = own.get("default")
    if not isinstance(own, str):
        raise ConfigError(
            f"template: 'auto' takes the tokenizer's own chat template, but {tokenizer.name_or_path or 'the tokenizer'}"
            " has none. Name one that suits the model, such as chatml, llama3 or qwen (docs/templates.md lists them);"
            " default and alpaca suit a model that was never trained to chat."
        )
    return own
