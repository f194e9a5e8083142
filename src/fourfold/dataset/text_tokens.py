"""Tokenising many texts at once, each different text, and where that is exact each different word, once.

Most byte-level tokenizers first split a text by a regular expression and then merge bytes within each piece. In the
expressions listed here a blank between two visible characters always begins a piece: no alternative has a blank in it
but as its first character, or in a run of blanks that must not end before a visible character. So such a tokenizer
gives the same ids for a text as for its parts, cut before these blanks, one after the other. (Before digits this holds
for single blanks only: some tokenizers cut digits out first, and then a run of blanks is a piece of its own.) Added
tokens are cut out before anything else, so what stands between two of them is tokenised on its own as well.

Parts recur, since natural text has few words, and looking one up costs a fraction of tokenising it. All steps for each
part are Arrow's and numpy's; Python sees each different part of a chunk once.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from fourfold.base.errors import DataError
from fourfold.dataset.encoded import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_PART_START = re.compile(r" (?<!\s )(?=\S)")
_SPACE = r"[\t-\r\x1c-\x20\x{85}\p{Z}]"
_UNEVEN = f"{_SPACE} | {_SPACE}| $"
"""Matches, as RE2 has it, what holds a blank at which no part begins (a blank at the very start aside)."""
_MOST_PARTS = 1 << 17
"""Parts that are remembered; about 40 MB."""
_LONGEST_PART = 32
"""Longer parts hardly recur and are not remembered."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = (
    _CONTRACTIONS + "|" + _WORDS + r"|\p{N}{1,3}|" + _REST,  # Llama 3
    _CONTRACTIONS + "|" + _WORDS + r"|\p{N}|" + _REST,  # Qwen 2 and 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2; ByteLevel has it built in
)


class TextTokenizer:
    """Token ids of texts, without special tokens around them; equal to `tokenizer.encode` of each text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = None
        self._added: re.Pattern[str] | None = None
        self._firsts, self._others = None, None
        self._is_known = False
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            tokenizer.encode("", add_special_tokens=False)  # settles truncation, padding and special-token splitting
            self._backend = tokenizer.backend_tokenizer

    def _get_to_know(self) -> None:
        """Find out how the tokenizer cuts texts; half a second for a large one, so only where there is a text."""
        self._is_known = True
        if self._backend is None:
            return
        facts = json.loads(self._backend.to_str())
        if not self._backend.encode_special_tokens:
            self._added = tokens_cut_out(facts)
        if splits_at_blanks(facts):
            # The first part of a text is tokenised as it is, the others with the blank before them.
            self._firsts, self._others = _PartTable(self._encode_whole, ""), _PartTable(self._encode_whole, " ")

    def encode(self, texts: Iterable[str]) -> dict[str, TokenIds]:
        """The token ids of each different text.

        Raises:
            DataError: a text holds half of a character, as JSON may, and so has no bytes.
        """
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        if not self._is_known:
            self._get_to_know()
        try:
            return self._encode_all(unique)
        except (UnicodeEncodeError, TypeError) as error:
            for text in unique:
                if (found := _LONE_SURROGATE.search(text)) is not None:
                    half, near = f"\\u{ord(found[0]):04x}", text[max(found.start() - 12, 0) : found.start()]
                    raise DataError(f"a text holds half of a character ({half} after {near!r})") from error
            raise

    def _encode_all(self, unique: list[str]) -> dict[str, TokenIds]:
        if self._firsts is None or self._others is None:
            ids = [array("i", found) for found in self._encode_whole(unique)]
        else:
            ids = self._encode_by_parts(unique, self._firsts, self._others)
        return dict(zip(unique, ids, strict=True))

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_by_parts(self, texts: Sequence[str], firsts: _PartTable, others: _PartTable) -> list[TokenIds]:
        """Each text as the parts of the stretches between added tokens, and each part as its ids."""
        stretches = [[text] if self._added is None else self._added.split(text) for text in texts]
        cut = _cut_at_blanks(list(chain.from_iterable(stretches)))
        starts, parts = cut.offsets.to_numpy(), cut.values
        is_first = np.zeros(len(parts), dtype=bool)
        is_first[starts[:-1]] = True
        sizes = np.empty(len(parts), dtype=np.int64)
        begins = np.empty(len(parts), dtype=np.int64)
        ids = np.empty(0, dtype=np.int32)
        for chosen, table in ((is_first, firsts), (~is_first, others)):
            found, begin, stop = table.look_up(parts.filter(pa.array(chosen)))
            begins[chosen], sizes[chosen] = begin + len(ids), stop - begin
            ids = np.concatenate([ids, found])
        ends = np.cumsum(sizes)
        joined = array("i", ids[np.arange(sizes.sum()) + np.repeat(begins - ends + sizes, sizes)].tobytes())
        last = starts[np.cumsum([len(each) for each in stretches])] - 1
        edges = [0, *ends[last].tolist()]
        return [joined[start:stop] for start, stop in pairwise(edges)]

    @property
    def num_remembered(self) -> int:
        """Parts whose ids are held."""
        return sum(len(table) for table in (self._firsts, self._others) if table is not None)

    @property
    def bos_ids(self) -> list[int]:
        """The beginning-of-sequence token, if the tokenizer is one that puts it before texts; else nothing."""
        bos, tokenizer = self._tokenizer.bos_token_id, self._tokenizer
        adds = isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.add_bos_token
        return [bos] if adds and isinstance(bos, int) else []


class _PartTable:
    """Token ids of the parts seen so far.

    Args:
        encode: gives the ids of texts.
        blank: what stands before the parts, "" or a blank.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[list[int]]], blank: str) -> None:
        self._encode, self._blank = encode, blank
        self._numbers: dict[str, int] = {}
        self._ids, self._edges = np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def look_up(self, parts: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the ids of parts are.

        Returns:
            int32 ids, and int64 [parts]: where in them those of each part begin, and where they stop.
        """
        encoded = parts.dictionary_encode()
        different: list[str] = encoded.dictionary.to_pylist()
        numbers = np.fromiter(map(self._numbers.get, different, repeat(-1)), dtype=np.int64, count=len(different))
        unknown = np.flatnonzero(numbers < 0).tolist()
        unknown.sort(key=lambda place: len(different[place]) > _LONGEST_PART)
        numbers[unknown] = np.arange(len(unknown)) + len(self._numbers)
        ids, edges = self._add([different[place] for place in unknown])
        numbers = numbers[encoded.indices.to_numpy()]
        return ids, edges[numbers], edges[numbers + 1]

    def _add(self, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids and edges of all parts with those of new ones, of which the long ones, at the end, are not kept."""
        if not parts:
            return self._ids, self._edges
        found = self._encode([self._blank + part for part in parts])
        ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(found), dtype=np.int32)])
        edges = np.concatenate([self._edges, self._edges[-1] + np.cumsum([len(each) for each in found])])
        kept = [part for part in parts if len(part) <= _LONGEST_PART]
        first = len(self._numbers)
        self._numbers.update(zip(kept, range(first, first + len(kept)), strict=True))
        self._edges = edges[: len(self._numbers) + 1]
        self._ids = ids[: self._edges[-1]].copy()
        if len(self._numbers) > _MOST_PARTS:
            self.__init__(self._encode, self._blank)
        return ids, edges


def _cut_at_blanks(texts: Sequence[str]) -> pa.ListArray:
    """The parts of texts, without the blanks at which they begin."""
    whole = pa.array(texts, pa.large_string())
    # pyarrow defines these functions when it is imported.
    cut: pa.ListArray = pc.split_pattern(whole, " ")  # pyright: ignore[reportAttributeAccessIssue]
    found: pa.Array = pc.match_substring_regex(whole, _UNEVEN)  # pyright: ignore[reportAttributeAccessIssue]
    uneven = found.to_numpy(zero_copy_only=False)
    if not uneven.any():
        return cut
    others = np.flatnonzero(uneven)
    parts = pa.array([_PART_START.split(texts[place]) for place in others.tolist()], cut.type)
    order = np.argsort(np.concatenate([np.flatnonzero(~uneven), others]))
    return pa.concat_arrays([cut.filter(pa.array(~uneven)), parts]).take(pa.array(order))


def _any_of(texts: Sequence[str]) -> str:
    """A regular expression that matches the longest of some texts; quick also for hundreds that begin alike."""
    tails: dict[str, list[str]] = {}
    for text in sorted(texts, key=len, reverse=True):
        tails.setdefault(text[:2], []).append(re.escape(text[2:]))
    return "|".join(f"{re.escape(head)}(?:{'|'.join(tails[head])})" for head in sorted(tails, key=len, reverse=True))


def tokens_cut_out(backend: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Matches the added tokens that a tokenizer takes out of a text before anything else; None if it has none.

    Args:
        backend: as in `splits_at_blanks`.
    """
    contents = [token["content"] for token in backend["added_tokens"] if token["content"] and not token["normalized"]]
    return re.compile(f"({_any_of(contents)})") if contents else None


def splits_at_blanks(backend: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is known to begin a piece at each blank that stands before a visible character.

    Args:
        backend: the tokenizer as `tokenizers` writes it as JSON.
    """
    if any(
        " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in backend["added_tokens"]
    ):
        return False
    if backend["model"]["type"] != "BPE" or backend["model"].get("dropout"):
        return False
    if (backend["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # composes nothing with a blank
        return False
    return _begins_pieces_at_blanks(backend["pre_tokenizer"])


def _begins_pieces_at_blanks(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if steps and steps[0]["type"] == "Digits":
        steps = steps[1:]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return True
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern in _SPLITS
        case _:
            return False
