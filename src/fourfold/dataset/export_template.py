"""A template of the project as plain Jinja in transformers' conventions, to be saved with a model.

The exported source is a head that brings the conventions of `apply_chat_template` (a system turn among the messages,
tool calls as objects, content as parts) to what a body expects, then the body with its marks taken out.
"""

from __future__ import annotations

import json
import re

from fourfold.dataset.marked_body import function_role
from fourfold.dataset.reasoning import Thoughts
from fourfold.dataset.template import Template
from fourfold.dataset.tools import ToolFormat

_READ_MESSAGES = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set seen = namespace(system='', turns=[], calls=[], text='') -%}
{%- for message in messages -%}
  {%- set seen.text = text_of(message.content) -%}
  {%- if message.role in ('system', 'developer') -%}
    {%- set seen.system = seen.text -%}
  {%- else -%}
    {%- set seen.calls = [] -%}
    {%- for call in message.tool_calls or [] -%}
      {%- set call = call.function if call.function is defined else call -%}
      {%- set seen.calls = seen.calls + [{'name': call.name, 'arguments': call.arguments}] -%}
    {%- endfor -%}
    {%- set calls = write(seen.calls) if seen.calls else '' -%}
    {%- set role = 'observation' if message.role == 'tool' else function_role if calls else message.role -%}
    {%- set turn = {'role': role, 'content': seen.text + calls, 'text': seen.text, 'calls': calls} -%}
    {%- set seen.turns = seen.turns + [turn] -%}
  {%- endif -%}
{%- endfor -%}
{%- set system = seen.system or default_system or none -%}
{%- if tools -%}
  {%- set system = (system or '') + describe(tools) -%}
{%- endif -%}
{%- set messages = seen.turns -%}
"""

_REMOVE_THOUGHTS = """\
{%- macro without_thoughts(text) -%}
  {%- set kept = namespace(text='') -%}
  {%- set parts = text.split(thought_end) -%}
  {%- for part in parts[:-1] -%}
    {%- if thought_start in part -%}
      {%- set kept.text = kept.text + part.split(thought_start, 1)[0] -%}
    {%- else -%}
      {%- set kept.text = kept.text + part + thought_end -%}
    {%- endif -%}
  {%- endfor -%}
  {{- (kept.text + parts[-1]).lstrip('\\n') -}}
{%- endmacro -%}
{%- set seen.turns = [] -%}
{%- for message in messages -%}
  {%- set responds = message.role in ('assistant', 'function') -%}
  {%- set seen.text = message.text -%}
  {%- if responds and ((enable_thinking is false) if loop.last else not preserve_thinking) -%}
    {%- set seen.text = without_thoughts(message.text) -%}
  {%- endif -%}
  {%- set content = seen.text + message.calls -%}
  {%- set thinks = thought_start | trim in content or thought_end | trim in content -%}
  {%- set thought = empty_thought if responds and loop.last and not thinks else '' -%}
  {%- set seen.turns = seen.turns + [{'role': message.role, 'content': content, 'thought': thought}] -%}
{%- endfor -%}
{%- set messages = seen.turns -%}
"""

_THINK_NOT = """\
{%- if add_generation_prompt and not enable_thinking -%}
  {{- empty_thought -}}
{%- endif -%}
"""


def export_template(
    template: Template,
    tools: ToolFormat,
    *,
    default_system: str,
    enable_thinking: bool | None,
    preserve_thinking: bool,
) -> str:
    """The source to save as `tokenizer.chat_template`.

    Args:
        template: any but `auto`.
        tools: the tool format in use.
        default_system: the default system prompt in use.
        enable_thinking: what the exported template does where its caller does not say.
        preserve_thinking: likewise.
    """
    constants: dict[str, str] = {
        "default_system": _literal(default_system),
        "function_role": _literal(function_role(template, tools)),
    }
    opening, parts = "", [tools.macros, _READ_MESSAGES]
    if template.facts.reasoning:
        thoughts = Thoughts(template.facts.thought_words, template.facts.empty_thought)
        constants |= {
            "thought_start": _literal(thoughts.words[0]),
            "thought_end": _literal(thoughts.words[1]),
            "empty_thought": _literal(thoughts.empty),
            "enable_thinking": _or_default("enable_thinking", enable_thinking),
            "preserve_thinking": _or_default("preserve_thinking", preserve_thinking),
        }
        opening = "{{- message.thought -}}"
        parts.append(_REMOVE_THOUGHTS)
    parts.append(_without_marks(template.body, opening))
    if template.facts.reasoning:
        parts.append(_THINK_NOT)
    head = "".join(f"{{%- set {name} = {value} -%}}\n" for name, value in constants.items())
    return head + "".join(part if part.endswith("\n") else part + "\n" for part in parts)


def _literal(value: str | bool | None) -> str:
    """A Jinja literal."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower()


def _or_default(name: str, value: bool | None) -> str:
    """What the caller says, or else `value`."""
    return f"{name} if {name} is defined else {_literal(value)}"


def _without_marks(body: str, opening: str) -> str:
    """The body without its tags of marks; `opening` takes the place of the first of each pair.

    All tags of the project's bodies trim the white space on both sides, so the tag and the space around it can go.
    """
    body = re.sub(r"\n *\{%-\s*generation\s*-%\}", lambda _: f"\n    {opening}" if opening else "", body)
    return re.sub(r"\n *\{%-\s*(?:endgeneration|cut)\s*-%\}", "", body)
