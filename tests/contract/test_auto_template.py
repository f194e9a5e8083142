"""`template: auto` on the real model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Message
from fourfold.dataset.template import load_template
from fourfold.models.gguf_tokenizer import load_gguf_tokenizer


@pytest.mark.model
def test_auto_when_the_tokenizer_is_smollm2s_gives_the_ids_of_its_chat_template(smollm2_gguf: Path) -> None:
    tokenizer = load_gguf_tokenizer(smollm2_gguf)
    renderer = Renderer(load_template("auto", tokenizer), tokenizer)
    texts = ["In 2024?", " Yes: {{it}} is\n", "你好 'x'", "Hello"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    ours = [Message.of("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]

    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    turns = renderer.encode_turns(ours)
    assert [token for turn in turns for token in turn.prompt_ids + turn.response_ids] == whole
    assert tokenizer.decode(turns[1].response_ids) == "Hello<|im_end|>\n"

    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert renderer.encode_prompt(ours[:3]) == prompt
    assert renderer.stop_token_ids == (tokenizer.eos_token_id,)
