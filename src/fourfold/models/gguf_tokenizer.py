"""A tokenizer from a GGUF file.

Byte-level BPE vocabularies are built here, with the pre-tokenizer that `tokenizer.ggml.pre` names: without the right
one text is split where the model never saw it split ("2024" as one token, say). SentencePiece vocabularies go
through Transformers' own GGUF loader, which is right about those.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fourfold.base.errors import ModelError
from fourfold.base.log import get_logger
from fourfold.models.gguf import GgufFile, gguf_package, read_gguf

log = get_logger(__name__)

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of the file: control tokens are special, user-defined ones are matched whole but are plain text."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_START = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = "gpt2"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD_START}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD_START}\p{{L}}+|\p{{N}}|{_TAIL}"
_GPT4O = (
    rf"{_WORD_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"{_WORD_START}{_UPPER}*{_LOWER}+|{_WORD_START}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits"

_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion", "granite-docling"), (_GPT2,)
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (_DIGITS, _GPT2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _DIGITS),
}
"""`tokenizer.ggml.pre` -> the splits in order; each name stands for what its model's own tokenizer.json does."""

_IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "tekken", "llama4"}
"""A word that is itself in the vocabulary is taken whole, whatever the merges say."""

_NFC = {"qwen2", "deepseek-r1-qwen", "command-r"}
"""Tokenizers that compose Unicode characters first."""


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file holds, with its chat template and special tokens.

    Raises:
        ModelError: the file is damaged or holds no tokenizer.
    """
    file = read_gguf(path)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise ModelError(f"model_name_or_path: {path} holds no tokenizer. Use a file that was made with one.")
    if kind != "gpt2":
        gguf_package()
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return _wrap(file, _build_bpe(file))


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list):
        raise ModelError(
            f"model_name_or_path: {file.path} has no list {key}. Use a file that was made with a tokenizer."
        )
    return [str(item) for item in value]


def _build_bpe(file: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer without its special tokens' roles."""
    tokens = _strings(file, "tokenizer.ggml.tokens")
    pairs = [merge.split(" ", 1) for merge in _strings(file, "tokenizer.ggml.merges")]
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if name not in _PRE_TOKENIZERS:
        log.warning(
            "model_name_or_path: %s names the pre-tokenizer %r, which is not known; GPT-2's is used and some text may "
            "be split differently than the model has seen. Use the model's Transformers folder to be sure.",
            file.path,
            name,
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in pairs],
            ignore_merges=name in _IGNORE_MERGES,
        )
    )
    tokenizer.normalizer = normalizers.NFC() if name in _NFC else None
    tokenizer.pre_tokenizer = build_pre_tokenizer(_PRE_TOKENIZERS.get(name, (_GPT2,)))
    tokenizer.decoder = decoders.ByteLevel()
    types = file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(types, list):
        tokenizer.add_special_tokens([_added(t) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
        tokenizer.add_tokens([_added(t) for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED])
    return tokenizer


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def build_pre_tokenizer(splits: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of a list of splits: regular expressions, or `digits` and `gpt2` for the built-in ones.

    Ends with the byte-level alphabet; GPT-2's own expression is part of that step.
    """
    steps: list[pre_tokenizers.PreTokenizer] = []
    for split in splits:
        if split == _DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif split != _GPT2:
            steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_GPT2 in splits))
    return pre_tokenizers.Sequence(steps)


def _wrap(file: GgufFile, tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Give the tokenizer its special tokens, its chat template and the bos or eos that it adds to every text."""
    tokens = _strings(file, "tokenizer.ggml.tokens")
    special: dict[str, str] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and index < len(tokens):
            special[f"{role}_token"] = tokens[index]
    before = special.get("bos_token") if file.metadata.get("tokenizer.ggml.add_bos_token") else None
    after = special.get("eos_token") if file.metadata.get("tokenizer.ggml.add_eos_token") else None
    tokenizer.post_processor = _post_processor(tokenizer, before, after)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, name_or_path=str(file.path), **special
    )
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        wrapped.chat_template = template
    return wrapped


def _post_processor(tokenizer: Tokenizer, before: str | None, after: str | None) -> processors.PostProcessor:
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=False)]
    if before or after:
        single = " ".join([*([before] if before else []), "$A", *([after] if after else [])])
        pair = " ".join([single, *([f"{before}:1"] if before else []), "$B:1", *([f"{after}:1"] if after else [])])
        used = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=used))
    return processors.Sequence(steps)
