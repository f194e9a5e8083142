"""`template: auto`: a tokenizer's own chat template, with and without generation marks."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import make_byte_tokenizer
from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Message
from fourfold.dataset.template import load_template
from fourfold.dataset.tools import ToolCall

PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};"
    "{% endgeneration %}{% else %}U:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% if loop.last %}(){% endif %}{{ m.content }};{% else %}"
    "U:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
TOOLS_TOO = (
    "{% if tools %}T:{{ tools | tojson }};{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ {'name': c.function.name, 'arguments': c.function.arguments} "
    "| tojson }}\n</tool_call>{% endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [
    Message.of("user", "Hi {{x}}"),
    Message.of("assistant", " Ho\n"),
    Message.of("user", "A"),
    Message.of("assistant", "B"),
]
TOOLS = '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]'
CALL = [Message.of("user", "Q"), Message.of("function", '{"name": "f", "arguments": {"x": 1}}')]
CALL += [Message.of("observation", "1"), Message.of("assistant", "One")]


def make_renderer(chat_template: str, **settings: bool | str | None) -> Renderer:
    tokenizer = make_byte_tokenizer("<|im_start|>", "<|im_end|>", chat_template=chat_template)
    return Renderer(load_template("auto", tokenizer), tokenizer, **settings)  # pyright: ignore[reportArgumentType]


def texts(renderer: Renderer, messages: list[Message], **settings: bool) -> list[tuple[str, str]]:
    turns = renderer.render_turns(messages, "", "", **settings)
    return [("".join(s.text for s in prompt), "".join(s.text for s in response)) for prompt, response in turns]


def apply(tokenizer: PreTrainedTokenizerFast, messages: list[Message], prompt: bool) -> list[int]:
    turns = [{"role": message.role, "content": message.text} for message in messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)  # pyright: ignore


def test_render_turns_when_prefixes_nest_finds_the_responses() -> None:
    renderer = make_renderer(PLAIN)
    assert texts(renderer, TALK) == [
        ("<|im_start|>user\nHi {{x}}<|im_end|>\n<|im_start|>assistant\n", " Ho\n<|im_end|>\n"),
        ("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n", "B<|im_end|>\n"),
    ]
    ids = [token for turn in renderer.encode_turns(TALK) for token in turn.prompt_ids + turn.response_ids]
    assert ids == apply(renderer.tokenizer, TALK, prompt=False)  # pyright: ignore[reportArgumentType]
    assert renderer.encode_prompt(TALK[:3]) == apply(renderer.tokenizer, TALK[:3], prompt=True)  # pyright: ignore
    assert renderer.chat_template == PLAIN


def test_render_turns_when_marks_are_there_uses_them() -> None:
    renderer = make_renderer(MARKED)
    assert texts(renderer, TALK) == [("<BOS>U:Hi {{x}};A:", " Ho\n;"), ("U:A;A:", "B;")]
    assert renderer.render_text(TALK[:3], add_generation_prompt=True) == "<BOS>U:Hi {{x}};A: Ho\n;U:A;A:"


def test_render_turns_when_prefixes_do_not_nest_names_the_way_out() -> None:
    renderer = make_renderer(FORGETFUL)
    with pytest.raises(ConfigError, match=r"shows turn 1 .* mask_history: true"):
        renderer.render_turns(TALK, "", "")
    assert texts(renderer, TALK[:2]) == [("U:Hi {{x}};A:", "() Ho\n;")]
    assert texts(renderer, TALK, mask_history=True) == [("U:Hi {{x}};A: Ho\n;U:A;A:", "()B;")]
    assert renderer.encode_prompt(TALK[:3]) == renderer.encode_last_turn(TALK).prompt_ids


def test_render_turns_when_the_opening_is_not_kept_refuses() -> None:
    renderer = make_renderer(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    with pytest.raises(ConfigError, match=r"opens a response with .*A:'"):
        renderer.render_turns(TALK, "", "")


def test_render_turns_when_the_template_raises_tells_its_message() -> None:
    with pytest.raises(DataError, match="no systems here"):
        make_renderer("{{ raise_exception('no systems here') }}").render_turns(TALK, "S", "")
    with pytest.raises(ConfigError, match="is not valid Jinja"):
        make_renderer("{% for %}")


def test_tools_when_the_template_knows_them_are_left_to_it() -> None:
    renderer = make_renderer(TOOLS_TOO)
    text = renderer.render_text(CALL, "S", TOOLS)
    wrapped = json.dumps([{"type": "function", "function": json.loads(TOOLS)[0]}])
    written = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert text == f"T:{wrapped};system:S;user:Q;assistant:{written};tool:1;assistant:One;"
    assert renderer.parse_tool_calls(written) == [ToolCall("f", {"x": 1})]


def test_tools_when_the_template_has_no_place_for_them_are_told_in_the_system_prompt() -> None:
    renderer = make_renderer(PLAIN)
    text = renderer.render_text(CALL, "", TOOLS)
    assert text.startswith("<|im_start|>system\nYou have access to the following tools:")
    assert 'assistant\nAction: f\nAction Input: {"x": 1}<|im_end|>' in text
    assert "<|im_start|>user\n1<|im_end|>" in text
    assert make_renderer(TOOLS_TOO, tool_format="qwen").render_text(CALL, "", TOOLS).startswith("system:\n\n# Tools")


def test_stop_token_ids_when_a_turn_ends_with_a_token_of_its_own_holds_it() -> None:
    renderer = make_renderer(PLAIN)
    end = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert renderer.stop_token_ids == (257, end)
