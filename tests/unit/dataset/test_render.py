"""The renderer: turns, thoughts, special tokens, tools; with a tokenizer of bytes."""

from __future__ import annotations

import datetime
import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import make_byte_tokenizer
from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Message
from fourfold.dataset.special_tokens import settle_special_tokens
from fourfold.dataset.template import load_template, parse_template
from fourfold.dataset.tools import ToolCall

GOLDEN = Path(__file__).parents[2] / "golden"
BOS, EOS = 256, 257
TOOLS = '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]'


def make_renderer(name: str, **settings: bool | str | datetime.date | None) -> Renderer:
    tokenizer = make_byte_tokenizer()
    return Renderer(load_template(name, tokenizer), tokenizer, **settings)  # pyright: ignore[reportArgumentType]


def chat(*texts: str) -> list[Message]:
    return [Message.of("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def test_encode_turns_when_template_ends_with_eos_puts_its_id_into_the_response() -> None:
    renderer = make_renderer("vicuna", default_system="")
    (turn,) = renderer.encode_turns(chat("A", "B"))
    encode = renderer.tokenizer.encode
    assert turn.prompt_ids == encode("USER: A ASSISTANT:")
    assert turn.response_ids == [*encode("B"), EOS]


def test_encode_turns_when_eos_is_efficient_labels_the_next_prompt_with_it() -> None:
    renderer = make_renderer("falcon")
    turns = renderer.encode_turns(chat("A", "B", "C", "D"))
    assert [turn.prompt_label for turn in turns] == [None, EOS]
    assert EOS not in [token for turn in turns for token in turn.response_ids]
    assert renderer.closing_ids == (EOS,)
    assert make_renderer("chatml").closing_ids == ()


def test_encode_turns_when_tokenizer_has_no_bos_leaves_it_out() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.bos_token = None
    renderer = Renderer(load_template("deepseek3", tokenizer), tokenizer)
    assert renderer.render_text(chat("A", "B")) == "<｜User｜>A<｜Assistant｜>B<EOS>"


@pytest.mark.parametrize("text", ["{{ content }}", "{% raw %}", "\x1d0\x1fcut\x1d", "\x1d0\x1fbos\x1d", "a\r\n ", ""])
def test_render_text_when_text_looks_like_a_template_keeps_it_literal(text: str) -> None:
    renderer = make_renderer("chatml")
    expected = f"<|im_start|>system\n{text or 'S'}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
    expected += f"<|im_start|>assistant\n{text}<|im_end|>\n"
    assert renderer.render_text(chat(text, text), text or "S") == expected


def test_render_turns_when_a_response_is_empty_keeps_the_turns_apart() -> None:
    turns = make_renderer("empty").render_turns(chat("A", "", "B", ""), "", "")
    assert [("".join(s.text for s in p), "".join(s.text for s in r)) for p, r in turns] == [("A", ""), ("B", "")]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "ends with nothing"),
        (chat("A"), "ends with 'user'"),
        ([Message.of("assistant", "A")], "turn 1 has the role 'assistant'"),
        ([*chat("A"), *chat("B")], "turn 2 has the role 'user'"),
        ([Message.of("user", "A"), Message.of("function", "no JSON")], "is not the JSON of tool calls"),
        ([Message.of("user", "A"), Message.of("function", '{"name": "f"}')], "is not the JSON of tool calls"),
    ],
)
def test_encode_turns_when_messages_are_wrong_says_which(messages: list[Message], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        make_renderer("chatml").encode_turns(messages)


@pytest.mark.parametrize("tools", ["{", "{}", "[1]"])
def test_encode_turns_when_tools_are_not_a_json_list_says_so(tools: str) -> None:
    with pytest.raises(DataError, match=r"tools: "):
        make_renderer("chatml").encode_turns(chat("A", "B"), "", tools)


def test_encode_prompt_when_thinking_is_off_ends_with_an_empty_thought() -> None:
    history = chat("A", "<think>\nx\n</think>\n\nB", "C")
    opened = "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    thinks = make_renderer("qwen3").render_text(history, add_generation_prompt=True)
    assert thinks.endswith(opened)
    assert "<think>" not in thinks  # of the earlier turn
    off = make_renderer("qwen3", enable_thinking=False)
    assert off.render_text(history, add_generation_prompt=True).endswith(opened + "<think>\n\n</think>\n\n")
    kept = make_renderer("qwen3", preserve_thinking=True).render_text(history, add_generation_prompt=True)
    assert "<think>\nx\n</think>\n\nB" in kept


def test_render_turns_when_thinking_decides_where_the_empty_thought_goes() -> None:
    thought = "<think>\n\n</think>\n\n"
    for thinking, where in ((True, 1), (False, 0), (None, 0)):
        (turn,) = make_renderer("qwen3", enable_thinking=thinking).render_turns(chat("A", "B"), "", "")
        assert thought in [segment.text for segment in turn[where]]
        assert next(segment for segment in turn[where] if segment.text == thought).trained is bool(where)
        assert thought not in [segment.text for segment in turn[1 - where]]


def test_render_turns_when_history_is_masked_drops_its_thoughts_unless_preserved() -> None:
    messages = chat("A", "<think>\nx\n</think>\n\nB", "C", "<think>\ny\n</think>\n\nD")
    masked = make_renderer("qwen3").render_turns(messages, "", "", mask_history=True)
    assert [turn[1][0].text for turn in masked] == ["B<|im_end|>\n", "<think>\ny\n</think>\n\nD<|im_end|>\n"]
    kept = make_renderer("qwen3", preserve_thinking=True).render_turns(messages, "", "", mask_history=True)
    assert kept[0][1][0].text == "<think>\nx\n</think>\n\nB<|im_end|>\n"


def test_stop_token_ids_when_the_vocabulary_knows_the_stop_words_holds_them() -> None:
    tokenizer = make_byte_tokenizer("<|im_end|>")
    assert Renderer(load_template("qwen", tokenizer), tokenizer).stop_token_ids == (EOS, 258)


def test_settle_special_tokens_when_eos_is_replaced_changes_the_tokenizer() -> None:
    tokenizer = make_byte_tokenizer("<|eom_id|>")
    tokenizer.pad_token = None
    new = settle_special_tokens(load_template("llama3", tokenizer), tokenizer)
    assert new == ("<|eot_id|>",)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<|eot_id|>", 259, "<|eot_id|>")
    assert settle_special_tokens(load_template("llama3", tokenizer), tokenizer) == ()
    assert tokenizer.encode("<|eom_id|>") == [258]


def test_settle_special_tokens_when_there_is_nothing_to_replace_says_so() -> None:
    with pytest.raises(ConfigError, match="has replace_eos but no stop_words"):
        settle_special_tokens(parse_template("mine", "{#---\nreplace_eos: true\n---#}\n"), make_byte_tokenizer())


def test_tool_format_when_given_takes_the_place_of_the_templates_own() -> None:
    messages = [*chat("A"), Message.of("function", '{"name": "f", "arguments": "{\\"x\\": 1}"}')]
    renderer = make_renderer("mistral", tool_format="qwen")
    ((prompt, response),) = renderer.render_turns(messages, "", TOOLS)
    assert "<tools>" in prompt[-1].text
    assert response[0].text == ' <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    with pytest.raises(ConfigError, match=r"tool_format: 'qwem' is not known\. Did you mean qwen"):
        make_renderer("mistral", tool_format="qwem")


def test_parse_tool_calls_when_the_model_thought_first_reads_past_it() -> None:
    text = '<think>\nf?\n</think>\n\n{"name": "f", "parameters": {"x": [1, "y"]}}'
    assert make_renderer("llama3").parse_tool_calls(text) == [ToolCall("f", {"x": [1, "y"]})]
    assert make_renderer("llama3").parse_tool_calls("It is {not} a call.") is None


def test_fingerprint_when_a_setting_changes_is_another() -> None:
    monday, tuesday = datetime.date(2026, 11, 23), datetime.date(2026, 11, 24)
    base = make_renderer("qwen3", today=monday).fingerprint
    assert base == make_renderer("qwen3", today=tuesday).fingerprint  # it tells no date
    others = [make_renderer("qwen3", enable_thinking=False), make_renderer("qwen3", default_system="S")]
    others += [make_renderer("qwen"), make_renderer("qwen3", tool_format="default")]
    others += [make_renderer("llama3", today=monday), make_renderer("llama3", today=tuesday)]
    assert len({base, *(renderer.fingerprint for renderer in others)}) == 7


def test_renderer_when_sent_to_another_process_renders_the_same() -> None:
    renderer = make_renderer("qwen3", enable_thinking=None, tool_format="default", default_system="S")
    copy = pickle.loads(pickle.dumps(renderer))
    assert copy.fingerprint == renderer.fingerprint
    assert copy.encode_turns(chat("A", "B"), "", TOOLS) == renderer.encode_turns(chat("A", "B"), "", TOOLS)


def test_encode_turns_when_tokenizer_is_llama3s_gives_the_known_ids() -> None:
    golden = json.loads((GOLDEN / "llama3_identity.json").read_text(encoding="utf-8"))
    tokenizer = _words_of_llama3(golden["vocabulary"])
    template = load_template("llama3", tokenizer)
    assert settle_special_tokens(template, tokenizer) == ()
    (turn,) = Renderer(template, tokenizer).encode_turns(chat("hi", "Hello! I am"))
    assert [*turn.prompt_ids, *turn.response_ids] == golden["input_ids"]
    assert len(turn.prompt_ids) == golden["num_prompt_tokens"]


def _words_of_llama3(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """Whole words of Llama 3's vocabulary under their own ids, split as its tokenizer splits."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    pattern = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens([word for word in vocabulary if word.startswith("<|")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)
