"""Encoding: labels, cuts and packs; against the reference with the real tokenizer, and by hand with one of bytes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import make_byte_tokenizer
from data_folder import make_run, write_set
from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.batch import IGNORE_INDEX, Example
from fourfold.dataset.encode import Encoder, EncodeSettings, share_length
from fourfold.dataset.encoded import EncodedRow, Tokens, token_ids
from fourfold.dataset.prepare import prepare
from fourfold.dataset.render import Renderer
from fourfold.dataset.rows import Message, Row
from fourfold.dataset.special_tokens import settle_special_tokens
from fourfold.dataset.storage import expand_labels
from fourfold.dataset.template import load_template
from fourfold.models.gguf_tokenizer import load_gguf_tokenizer

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokenised.json").read_text(encoding="utf-8"))
PREFIXES = {"": "", "chosen": "chosen_", "rejected": "rejected_", "response": "", "kl": "kl_"}
EOS = 257


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_gguf: Path) -> PreTrainedTokenizerFast:
    return load_gguf_tokenizer(smollm2_gguf)


@pytest.mark.model
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])
def test_prepare_when_given_the_reference_rows_makes_the_reference_tokens(
    case: dict[str, Any], tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_set(tmp_path, "a", case["rows"], **case["entry"], placeholders={})
    run = make_run(tmp_path, dataset="a", **case["config"])
    tokenizer = copy.deepcopy(smollm2_tokenizer)  # the template changes its special tokens
    template = load_template(run.data.template, tokenizer)
    settle_special_tokens(template, tokenizer)
    data = prepare(run, tokenizer, Renderer(template, tokenizer)).train
    assert data is not None
    skipped = len(data) - len(case["expected"])
    for number, expected in enumerate(case["expected"], start=skipped):
        sample = data[number]
        for role, example in sample.sequences.items():
            assert example.input_ids == expected[f"{PREFIXES[role]}input_ids"]
            assert example.labels == expected.get(f"{PREFIXES[role]}labels", example.input_ids)
        if "kto_tags" in expected:
            assert sample.extras == {"desirable": float(expected["kto_tags"])}


@pytest.mark.parametrize(
    ("prompt", "response", "limit", "kept"),
    [
        (10, 20, 100, (10, 20)),
        (200, 20, 100, (80, 20)),
        (20, 200, 100, (20, 80)),
        (100, 300, 100, (25, 75)),
        (300, 100, 100, (75, 25)),
        (50, 50, 100, (50, 50)),
        (10, 10, 1, (1, 0)),
        (5, 0, 3, (3, 0)),
    ],
)
def test_share_length_when_too_long_cuts_the_longer_side_or_both(
    prompt: int, response: int, limit: int, kept: tuple[int, int]
) -> None:
    assert share_length(prompt, response, limit) == kept


def test_tokens_when_appended_count_targets_but_not_at_the_start_of_documents() -> None:
    tokens = Tokens()
    tokens.append(token_ids([1, 2]), trained=True)
    tokens.append(token_ids([3]), trained=True)
    tokens.append(token_ids([4, 5]), trained=False, first_label=9)
    tokens.append(token_ids([6]), trained=True)
    assert (tokens.spans, tokens.overrides) == ([0, 3, 5, 6], [3, 9])
    assert expand_labels(tokens.ids, tokens.spans, tokens.overrides) == [1, 2, 3, 9, IGNORE_INDEX, 6]
    assert tokens.num_targets == 4
    tokens.documents = [3, 2, 1]
    assert tokens.num_targets == 2
    labels = expand_labels(tokens.ids, tokens.spans, tokens.overrides)
    assert Example(list(tokens.ids), labels, tuple(tokens.documents)).num_targets == 2


def make_encoder(
    template: str = "chatml", tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> Encoder:
    tokenizer = tokenizer or make_byte_tokenizer("<|im_start|>", "<|im_end|>")
    renderer = Renderer(load_template(template, tokenizer), tokenizer)
    return Encoder(renderer, EncodeSettings(**{"kind": "chat", "cutoff_len": 1000, **settings}))


def chat(*texts: str, **more: Any) -> Row:
    messages = [Message.of("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]
    return Row(tuple(messages[:-1]), response=messages[-1], **more)


def shown(encoder: Encoder, item: EncodedRow, role: str = "") -> tuple[str, str]:
    """The text of a sequence and of what is trained of it; "·" where it is not."""
    tokens = item.sequences[role]
    labels = expand_labels(tokens.ids, tokens.spans, tokens.overrides)
    decode = encoder.renderer.tokenizer.decode
    trained = "".join("·" if label == IGNORE_INDEX else str(decode([label])) for label in labels)
    return str(decode(list(tokens.ids))), trained.replace("··", "").replace("·", "")


def test_encode_when_chat_has_turns_trains_every_answer() -> None:
    encoder = make_encoder()
    (item,) = encoder.encode([chat("ab", "cd", "ef", "gh")])
    text, trained = shown(encoder, item)
    assert text.startswith("<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n<|im_start|>user")
    assert trained == "cd<|im_end|>\ngh<|im_end|>\n"
    assert item.length == item.full_length


def test_encode_when_history_is_masked_trains_the_last_answer_and_cuts_the_first_turns() -> None:
    row = chat("a" * 20, "b" * 20, "ef", "gh")
    whole = make_encoder(mask_history=True)
    assert shown(whole, whole.encode([row])[0])[1] == "gh<|im_end|>\n"
    last_turn = len(make_encoder().encode([chat("ef", "gh")])[0].sequences[""].ids)
    cut = make_encoder(mask_history=True, cutoff_len=last_turn)
    (item,) = cut.encode([row])
    assert shown(cut, item) == (
        "<|im_start|>user\nef<|im_end|>\n<|im_start|>assistant\ngh<|im_end|>\n",
        "gh<|im_end|>\n",
    )
    assert item.full_length > item.length


def test_encode_when_chat_is_too_long_cuts_the_last_turns() -> None:
    first_turn = len(make_encoder().encode([chat("ab", "cd")])[0].sequences[""].ids)
    encoder = make_encoder(cutoff_len=first_turn + 3)
    (item,) = encoder.encode([chat("ab", "cd", "ef", "gh")])
    assert len(item.sequences[""].ids) == first_turn + 3
    assert shown(encoder, item)[1].startswith("cd<|im_end|>\n")


def test_encode_when_prompts_are_trained_labels_everything() -> None:
    encoder = make_encoder(train_on_prompt=True)
    tokens = encoder.encode([chat("ab", "cd")])[0].sequences[""]
    assert tokens.spans == [0, len(tokens.ids)]


def test_encode_when_eos_is_efficient_labels_the_next_prompt_with_it_and_ends_with_it() -> None:
    encoder = make_encoder("falcon", make_byte_tokenizer())
    tokens = encoder.encode([chat("ab", "cd", "ef", "gh")])[0].sequences[""]
    labels = expand_labels(tokens.ids, tokens.spans, tokens.overrides)
    places = [place for place, label in enumerate(labels) if label == EOS]
    assert len(places) == 2
    assert tokens.ids[places[0]] != EOS
    assert tokens.ids[places[1]] == EOS
    assert places[1] == len(tokens.ids) - 1


def test_encoder_when_eos_is_efficient_refuses_to_train_prompts() -> None:
    with pytest.raises(ConfigError, match="train_on_prompt: template 'falcon' writes answers without an end token"):
        make_encoder("falcon", make_byte_tokenizer(), train_on_prompt=True)


def test_encode_when_preference_is_too_long_cuts_both_answers_to_the_same_length() -> None:
    encoder = make_encoder(kind="preference", cutoff_len=60)
    row = chat("ab", "c" * 50, rejected=Message.of("assistant", "d" * 10))
    (item,) = encoder.encode([row])
    prompt = encoder.renderer.encode_prompt(row.messages)
    chosen, rejected = item.sequences["chosen"], item.sequences["rejected"]
    assert chosen.ids[: len(prompt)] == rejected.ids[: len(prompt)] == token_ids(prompt)
    assert len(chosen.ids) == 60
    assert shown(encoder, item, "rejected")[1] == "dddddddddd<|im_end|>\n"


def test_encode_when_kto_pairs_each_prompt_with_the_answer_before_it() -> None:
    encoder = make_encoder(kind="kto")
    items = encoder.encode([chat("a", "1", desirable=True), chat("b", "2", desirable=False), chat("c", "3")])
    assert [shown(encoder, item, "kl")[1][0] for item in items] == ["3", "1", "2"]
    assert "b<|im_end|>" in shown(encoder, items[1], "kl")[0]
    assert [item.extras["desirable"] for item in items[:2]] == [1.0, 0.0]


def test_encode_when_prompt_keeps_the_answer_as_reference() -> None:
    encoder = make_encoder(kind="prompt")
    answered, open_ended = encoder.encode([chat("a", "1"), Row((Message.of("user", "b"),))])
    assert list(answered.sequences["prompt"].ids) == encoder.renderer.encode_prompt([Message.of("user", "a")])
    assert answered.sequences["prompt"].spans == []
    assert shown(encoder, answered, "reference")[1] == "1<|im_end|>\n"
    assert len(open_ended.sequences["reference"].ids) == 0


def test_pack_when_text_cuts_blocks_and_keeps_where_documents_end() -> None:
    encoder = make_encoder(kind="text", cutoff_len=4, packing=True)
    encode = encoder.renderer.tokenizer.encode
    packed = encoder.pack(encoder.encode([Row(text="abcde"), Row(text=""), Row(text="fg")]))
    blocks = [item.sequences[""] for item in packed]
    assert [list(block.ids) for block in blocks] == [encode("abcd"), [*encode("e"), EOS, EOS, *encode("f")]]
    assert [block.documents for block in blocks] == [[4], [2, 1, 1]]


def test_encode_when_text_is_not_packed_cuts_it() -> None:
    encoder = make_encoder(kind="text", cutoff_len=4)
    encode = encoder.renderer.tokenizer.encode
    long, short = encoder.encode([Row(text="abcde"), Row(text="f")])
    assert list(long.sequences[""].ids) == encode("abcd")
    assert list(short.sequences[""].ids) == [*encode("f"), EOS]
    assert (long.full_length, long.length) == (6, 4)


def test_encode_when_tokenizer_begins_texts_with_bos_so_do_rows_and_blocks() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.add_bos_token = True
    rows = [Row(text="abcde")]
    single = make_encoder("default", tokenizer, kind="text")
    assert single.encode(rows)[0].sequences[""].ids[0] == 256
    packed = make_encoder("default", tokenizer, kind="text", cutoff_len=3, packing=True)
    assert [item.sequences[""].ids[0] for item in packed.pack(packed.encode(rows))] == [256, 256]


def test_encode_when_tokenizer_has_no_eos_refuses_text() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        make_encoder("chatml", tokenizer, kind="text").encode([Row(text="a")])


def test_pack_when_chat_joins_rows_as_documents_with_their_labels() -> None:
    encoder = make_encoder("falcon", make_byte_tokenizer(), packing=True)
    rows = [chat("a", "1", "b", "2"), chat("c", "3")]
    single = [item.sequences[""] for item in encoder.encode(rows)]
    (pack,) = encoder.pack(encoder.encode(rows))
    tokens = pack.sequences[""]
    assert tokens.documents == [len(each.ids) for each in single]
    expected = [label for each in single for label in expand_labels(each.ids, each.spans, each.overrides)]
    assert expand_labels(tokens.ids, tokens.spans, tokens.overrides) == expected
