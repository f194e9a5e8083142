"""Templates: their files, and what they render against recorded values."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from byte_tokenizer import make_byte_tokenizer
from fourfold.base.errors import ConfigError
from fourfold.dataset.render import Renderer, Segment
from fourfold.dataset.rows import Message
from fourfold.dataset.template import Template, load_template, parse_template, template_names
from fourfold.dataset.tools import tool_format_names

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "templates.json").read_text(encoding="utf-8"))
TODAY = datetime.date(2026, 11, 23)
TOKENIZER = make_byte_tokenizer()


def _conversation(name: str, template: Template) -> tuple[list[Message], str, str]:
    given = GOLDEN["conversations"][name]
    if isinstance(given, str):  # in the template's own words
        start, end = template.facts.thought_words
        texts = ["Q1", f"{start}T1{end}A1", "Q2", f"{start}T2{end}A2"]
        return [Message.of("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)], "", ""
    messages = [Message.of(turn["role"], turn["content"]) for turn in given["messages"]]
    return messages, given.get("system", ""), given.get("tools", "")


def _pieces(turn: tuple[list[Segment], list[Segment]]) -> dict[str, list[str]]:
    return {"prompt": [piece.text for piece in turn[0]], "response": [piece.text for piece in turn[1]]}


@pytest.mark.parametrize("name", GOLDEN["rendered"])
def test_pieces_of_template_when_rendered_equal_the_recorded_ones(name: str) -> None:
    template = load_template(name, TOKENIZER)
    for conversation, by_thinking in GOLDEN["rendered"][name].items():
        messages, system, tools = _conversation(conversation, template)
        for thinking, by_mode in by_thinking.items():
            wanted = {"True": True, "False": False, "None": None}[thinking.removeprefix("enable_thinking=")]
            renderer = Renderer(template, TOKENIZER, enable_thinking=wanted, today=TODAY)
            for mode, expected in by_mode.items():
                if mode == "oneturn":
                    found: Any = _pieces(renderer.render_last_turn(messages, system, tools))
                else:
                    turns = renderer.render_turns(messages, system, tools, mask_history=mode.endswith("cot"))
                    found = [_pieces(turn) for turn in turns]
                assert found == expected, (conversation, thinking, mode)


def test_template_names_when_listed_hold_auto_and_the_files() -> None:
    assert {"auto", "llama3", "default", "qwen3", "gpt_oss"} <= set(template_names())


def test_load_template_when_unknown_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'lama3' is not known. Did you mean llama3"):
        load_template("lama3", TOKENIZER)


def test_load_template_when_auto_and_the_tokenizer_has_none_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"has none\. Name one that suits the model"):
        load_template("auto", TOKENIZER)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{#---\nstop_word: x\n---#}\n{{ system }}", "stop_word"),
        ("{#---\n[\n---#}\n", "not valid"),
        ("{% generation %}x{% endgeneration %}", "does not trim"),
    ],
)
def test_parse_template_when_the_file_is_wrong_names_it(source: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_template("mine", source)


def test_parse_template_when_it_shares_a_body_takes_it() -> None:
    template = parse_template("mine", '{#---\nbody_of: chatml\ndefault_system: "D"\n---#}\n')
    assert template.body == load_template("chatml", TOKENIZER).body
    assert template.facts.default_system == "D"
    assert template.facts.stop_words == ()


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ("qwen", "qwen2_vl qwen2_omni llava_next_qwen"),
        ("qwen3", "qwen3_vl qwen3_omni keye_vl"),
        ("qwen3_nothink", "qwen3_vl_nothink qwen3_omni_nothink"),
        ("mimo", "mimo_vl"),
        ("vicuna", "llava llava_next llava_next_video video_llava"),
        ("llama3", "llava_next_llama3 mllama"),
        ("mistral", "llava_next_mistral llava_next_video_mistral"),
        ("yi", "llava_next_yi llava_next_video_yi minicpm_v minicpm_o"),
        ("gemma3", "gemma3n"),
        ("ministral", "pixtral"),
        ("intern2", "intern_vl intern_s1"),
        ("glmz1", "glm4v"),
        ("glm4_moe", "glm4_5v"),
    ],
)
def test_load_template_when_the_model_sees_as_well_is_that_of_its_text(base: str, names: str) -> None:
    expected = load_template(base, TOKENIZER)
    free = {"default_system": "", "stop_words": ()}  # what may be of its own
    for name in names.split():
        found = load_template(name, TOKENIZER)
        assert found.body == expected.body
        assert found.facts.model_copy(update=free) == expected.facts.model_copy(update=free)
        assert found.facts.stop_words[: len(expected.facts.stop_words)] == expected.facts.stop_words


def test_load_template_when_the_model_sees_as_well_has_its_own_words() -> None:
    facts = {
        name: load_template(name, TOKENIZER).facts for name in ("qwen2_vl", "qwen3_vl", "glm4v", "kimi_vl", "llava")
    }
    assert facts["qwen2_vl"].default_system == "You are a helpful assistant."
    assert facts["qwen3_vl"].default_system == ""
    assert facts["glm4v"].stop_words[-1] == "</answer>"
    assert facts["kimi_vl"].thought_words == ("◁think▷", "◁/think▷")
    assert facts["llava"] == load_template("vicuna", TOKENIZER).facts


def test_documentation_when_a_template_or_tool_format_is_added_lists_it() -> None:
    text = (Path(__file__).parents[3] / "docs" / "templates.md").read_text(encoding="utf-8")
    assert [name for name in (*template_names(), *tool_format_names()) if f"`{name}`" not in text] == []
