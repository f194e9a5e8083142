"""Layouts: contents are filled in only where a body does nothing else with them."""

from __future__ import annotations

import pytest

from byte_tokenizer import make_byte_tokenizer
from fourfold.dataset.chat_jinja import chat_environment
from fourfold.dataset.layout import only_inserts_contents
from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Message
from fourfold.dataset.template import AUTO, load_template, parse_template, template_names


@pytest.mark.parametrize("name", [name for name in template_names() if name != AUTO])
def test_only_inserts_contents_when_given_a_shipped_template_says_yes(name: str) -> None:
    body = load_template(name, make_byte_tokenizer()).body
    assert only_inserts_contents(chat_environment().parse(body))


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("{{ 'a' + message.content ~ 'b' }}", True),
        ("{% if message.role == 'user' %}{{ message.content }}{% endif %}", True),
        ("{% generation %}{{ message.content }}{% endgeneration %}", True),
        ("{{ message.content | trim }}", False),
        ("{{ message['content'] }}", False),
        ("{% if message.content %}x{% endif %}", False),
        ("{% set x = message.content %}{{ x }}", False),
        ("{{ message }}", False),
        ("{{ messages[0].content }}", False),
        ("{{ messages | length }}", False),
        ("{{ message.content.strip() }}", False),
    ],
)
def test_only_inserts_contents_when_a_body_does_more_says_no(inside: str, expected: bool) -> None:
    body = "{% for message in messages %}" + inside + "{% endfor %}"
    assert only_inserts_contents(chat_environment().parse(body)) == expected


def test_render_when_a_body_changes_contents_changes_them() -> None:
    body = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content | trim }}{% else %}"
        "{%- generation -%}{{ message.content | upper }}{%- endgeneration -%}{% endif %}{% endfor %}"
    )
    renderer = Renderer(parse_template("own", body), make_byte_tokenizer())
    for answer in ("b", "c"):
        assert (
            renderer.render_text([Message.of("user", " a "), Message.of("assistant", answer)]) == f"a{answer.upper()}"
        )


def test_render_when_roles_recur_fills_in_contents_as_they_are() -> None:
    renderer = Renderer(load_template("chatml", make_byte_tokenizer()), make_byte_tokenizer())
    for text in ("a", "\x1d0\x1fslot1\x1d", "", "{{ content }}"):
        shown = renderer.render_text([Message.of("user", text), Message.of("assistant", "b")])
        assert shown == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
