"""Every template: exported, transformers renders the same with it; prompts have the tokens that training gives them."""

from __future__ import annotations

import json

import pytest

from byte_tokenizer import make_byte_tokenizer
from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Message
from fourfold.dataset.template import load_template, template_names

NAMES = [name for name in template_names() if name != "auto"]
TOKENIZER = make_byte_tokenizer()
WEATHER = json.dumps(
    [
        {
            "name": "get_weather",
            "description": "Tell the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        }
    ]
)
CHAT = [Message.of("user", " Hi {{content}}\n"), Message.of("assistant", "Ho 'ho' ")]
CHAT += [Message.of("user", "你好"), Message.of("assistant", "再见")]
CALL = [Message.of("user", "Rain?"), Message.of("function", '{"name": "get_weather", "arguments": {"city": "Oslo"}}')]
CALL += [Message.of("observation", '{"rain": true}'), Message.of("assistant", "It rains.")]


@pytest.mark.parametrize("name", NAMES)
def test_exported_template_when_applied_by_transformers_gives_the_same_text(name: str) -> None:
    template = load_template(name, TOKENIZER)
    plain = [{"role": message.role, "content": message.text} for message in CHAT]
    call = {"type": "function", "function": json.loads(CALL[1].text)}
    called = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": '{"rain": true}'}]},
        {"role": "assistant", "content": "It rains."},
    ]
    for thinking in (True, False, None) if template.facts.reasoning else (True,):
        renderer = Renderer(template, TOKENIZER, enable_thinking=thinking)
        for system, tools, ours, theirs in [
            ("", "", CHAT, plain),
            ("S", "", CHAT, plain),
            ("S", WEATHER, CALL, called),
        ]:
            history = [{"role": "system", "content": system}, *theirs] if system else theirs
            for cut in (0, 1):
                applied = TOKENIZER.apply_chat_template(
                    history[: len(history) - cut],
                    tools=json.loads(tools) if tools else None,
                    chat_template=renderer.chat_template,
                    add_generation_prompt=bool(cut),
                    tokenize=False,
                )
                messages = ours[: len(ours) - cut]
                assert applied == renderer.render_text(messages, system, tools, add_generation_prompt=bool(cut))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_of_template_when_a_response_follows_has_the_same_tokens(name: str) -> None:
    renderer = Renderer(load_template(name, TOKENIZER), TOKENIZER, enable_thinking=False)
    turn = renderer.encode_last_turn(CHAT, "S")
    assert renderer.encode_prompt(CHAT[:-1], "S") == turn.prompt_ids
    turns = renderer.encode_turns(CHAT, "S")
    assert "再见" in TOKENIZER.decode(turns[-1].response_ids)
    assert "你好" not in TOKENIZER.decode([i for entry in turns for i in entry.response_ids])


@pytest.mark.parametrize("name", ["chatml", "chatml_de", "qwen", "qwen3_nothink", "yi", "smollm2"])
def test_exported_template_when_its_words_are_special_tokens_gives_the_same_ids(name: str) -> None:
    tokenizer = make_byte_tokenizer("<|im_start|>", "<|im_end|>")
    renderer = Renderer(load_template(name, tokenizer), tokenizer)
    messages = [{"role": message.role, "content": message.text} for message in CHAT]
    applied = tokenizer.apply_chat_template(messages, chat_template=renderer.chat_template, return_dict=False)
    turn = renderer.encode_last_turn(CHAT)
    assert applied == [*turn.prompt_ids, *turn.response_ids]
