"""From rows to token sequences: prompts, responses, what is trained, and how long sequences are cut.

One chunk of rows at a time: all texts of a chunk are tokenised in one call, each different text once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.encoded import ROLES, EncodedRow, TokenIds, Tokens, token_ids
from fourfold.dataset.formats.interface import RowKind
from fourfold.dataset.pack import pack_lengths
from fourfold.dataset.render import Renderer, Segment
from fourfold.dataset.rows import Message, Row
from fourfold.dataset.text_tokens import TextTokenizer

_TEXT_ENDS = {"llama3": "<|end_of_text|>"}
"""Templates whose end of a turn is not the end of a text."""


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """What shapes the token sequences.

    Attributes:
        kind: what the stage trains on.
        cutoff_len: longest sequence, in tokens.
        packing: put several samples into one sequence of at most `cutoff_len` tokens.
        train_on_prompt: prompts are trained too (chat only).
        mask_history: only the last response is trained, and it is the last to be cut (chat only).
    """

    kind: RowKind
    cutoff_len: int
    packing: bool = False
    train_on_prompt: bool = False
    mask_history: bool = False


def share_length(prompt_len: int, response_len: int, limit: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its response are kept within `limit`.

    The shorter side keeps all of its tokens while it takes less than half of the room; else both are cut in
    proportion. Equals `infer_seqlen` of LLaMA-Factory.
    """
    if response_len * 2 < limit:
        room = limit
    elif prompt_len * 2 < limit:
        room = limit - prompt_len
    else:
        room = int(limit * (response_len / (prompt_len + response_len)))
    kept_response = min(room, response_len)
    return min(max(limit - kept_response, 0), prompt_len), kept_response


@dataclass(frozen=True, slots=True)
class _Pair:
    """Token ids of a prompt and its response."""

    prompt: TokenIds
    response: TokenIds
    prompt_label: int | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class Encoder:
    """Turns rows into token sequences.

    Raises:
        ConfigError: prompts are to be trained with a template that does not allow it.
    """

    def __init__(self, renderer: Renderer, settings: EncodeSettings) -> None:
        self.renderer, self.settings = renderer, settings
        self._texts = TextTokenizer(renderer.tokenizer)
        self._closing = token_ids(renderer.closing_ids)
        eos = renderer.tokenizer.eos_token_id
        self._eos = eos if isinstance(eos, int) else None
        if settings.train_on_prompt and renderer.efficient_eos:
            raise ConfigError(
                f"train_on_prompt: template {renderer.template.name!r} writes answers without an end token, so its "
                "prompts cannot be trained. Use another template or leave train_on_prompt out."
            )

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """The sequences of a chunk of rows, one per row, in order; not packed yet."""
        match self.settings.kind:
            case "text":
                return self._encode_texts(rows)
            case "chat":
                return self._encode_chats(rows)
            case "preference":
                return self._encode_preferences(rows)
            case "kto":
                return self._encode_kto(rows)
            case "prompt":
                return self._encode_prompts(rows)

    def pack(self, encoded: Sequence[EncodedRow]) -> list[EncodedRow]:
        """The sequences of a chunk put together into packs; only for plain text and chat."""
        if self.settings.kind == "text":
            return self._blocks(encoded)
        packs = pack_lengths([item.length for item in encoded], self.settings.cutoff_len)
        return [_join([encoded[number] for number in pack]) for pack in packs]

    # --- one method per kind -------------------------------------------------------------------------------------

    def _encode_chats(self, rows: Sequence[Row]) -> list[EncodedRow]:
        masked = self.settings.mask_history
        rendered = [
            self.renderer.render_turns((*row.messages, _response(row)), row.system, row.tools, mask_history=masked)
            for row in rows
        ]
        ids = self._tokenise(part for turns in rendered for turn in turns for part in turn)
        eos = self._eos if self.renderer.efficient_eos else None
        encoded = []
        for number, turns in enumerate(rendered):
            # The end token of a response is the label of the next prompt's first token. With mask_history the prompt
            # that has none is the last, not the first: so the sequences equal LLaMA-Factory's.
            without = len(turns) - 1 if masked else 0
            pairs = [
                _Pair(ids(prompt), ids(response), None if index == without else eos)
                for index, (prompt, response) in enumerate(turns)
            ]
            tokens = self._join_turns(pairs)
            full = sum(len(pair) for pair in pairs) + len(self._closing)
            encoded.append(EncodedRow({"": tokens}, number, full))
        return encoded

    def _join_turns(self, pairs: Sequence[_Pair]) -> Tokens:
        """Turns end to end, each cut to its share of what is left of the cutoff; what comes too late is left out."""
        settings = self.settings
        closing = self._closing
        used = len(closing)
        kept: list[tuple[_Pair, int, int]] = []
        for pair in reversed(pairs) if settings.mask_history else pairs:
            if used >= settings.cutoff_len:
                break
            prompt_len, response_len = share_length(len(pair.prompt), len(pair.response), settings.cutoff_len - used)
            used += prompt_len + response_len
            kept.append((pair, prompt_len, response_len))
        tokens = Tokens()
        in_order = kept[::-1] if settings.mask_history else kept
        for number, (pair, prompt_len, response_len) in enumerate(in_order):
            masked = settings.mask_history and number < len(in_order) - 1
            tokens.append(pair.prompt[:prompt_len], trained=settings.train_on_prompt, first_label=pair.prompt_label)
            tokens.append(pair.response[:response_len], trained=not masked)
        tokens.append(closing, trained=True)
        return tokens

    def _encode_preferences(self, rows: Sequence[Row]) -> list[EncodedRow]:
        rendered = [
            [
                self.renderer.render_last_turn((*row.messages, answer), row.system, row.tools)
                for answer in (_response(row), _rejected(row))
            ]
            for row in rows
        ]
        ids = self._tokenise(part for pair in rendered for turn in pair for part in turn)
        encoded = []
        for number, ((prompt, chosen), (_, rejected)) in enumerate(rendered):
            prompt_ids = ids(prompt)
            answers = [ids(answer) + self._closing for answer in (chosen, rejected)]
            longest = max(len(answer) for answer in answers)
            kept_prompt, kept = share_length(len(prompt_ids), longest, self.settings.cutoff_len)
            sequences = {
                role: _prompted(prompt_ids[:kept_prompt], answer[:kept])
                for role, answer in zip(ROLES["preference"], answers, strict=True)
            }
            full = 2 * len(prompt_ids) + sum(len(answer) for answer in answers)
            encoded.append(EncodedRow(sequences, number, full))
        return encoded

    def _encode_kto(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Each row with its response, and with the response of the row before it (the first: of the last)."""
        rendered = [
            [
                self.renderer.render_last_turn((*row.messages, answer), row.system, row.tools)
                for answer in (_response(row), _response(rows[number - 1]))
            ]
            for number, row in enumerate(rows)
        ]
        ids = self._tokenise(part for pair in rendered for turn in pair for part in turn)
        encoded = []
        for number, turns in enumerate(rendered):
            sequences, full = {}, 0
            for role, (prompt, response) in zip(ROLES["kto"], turns, strict=True):
                prompt_ids, response_ids = ids(prompt), ids(response) + self._closing
                kept_prompt, kept = share_length(len(prompt_ids), len(response_ids), self.settings.cutoff_len)
                sequences[role] = _prompted(prompt_ids[:kept_prompt], response_ids[:kept])
                full += len(prompt_ids) + len(response_ids)
            desirable = 1.0 if rows[number].desirable else 0.0
            encoded.append(EncodedRow(sequences, number, full, {"desirable": desirable}))
        return encoded

    def _encode_prompts(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Prompts to be answered by the model, and the reference answer where the row has one."""
        rendered = [
            (self.renderer.render_prompt(row.messages, row.system, row.tools), None)
            if row.response is None
            else self.renderer.render_last_turn((*row.messages, row.response), row.system, row.tools)
            for row in rows
        ]
        ids = self._tokenise(part for turn in rendered for part in turn if part is not None)
        encoded = []
        for number, (prompt, reference) in enumerate(rendered):
            prompt_ids = ids(prompt)
            reference_ids = token_ids() if reference is None else ids(reference) + self._closing
            kept_prompt, kept = share_length(len(prompt_ids), len(reference_ids), self.settings.cutoff_len)
            sequences = {"prompt": Tokens(prompt_ids[:kept_prompt]), "reference": Tokens()}
            sequences["reference"].append(reference_ids[:kept], trained=True)
            encoded.append(EncodedRow(sequences, number, len(prompt_ids) + len(reference_ids)))
        return encoded

    def _encode_texts(self, rows: Sequence[Row]) -> list[EncodedRow]:
        texts = [row.text or "" for row in rows]
        table = self._texts.encode(texts)
        end = token_ids([self._end_of_text()])
        encoded = []
        for number, text in enumerate(texts):
            ids = table[text] + end
            tokens = Tokens()
            if not self.settings.packing:
                ids = token_ids(self._texts.bos_ids) + ids
            tokens.append(ids if self.settings.packing else ids[: self.settings.cutoff_len], trained=True)
            encoded.append(EncodedRow({"": tokens}, number, len(ids)))
        return encoded

    def _end_of_text(self) -> int:
        named = _TEXT_ENDS.get(self.renderer.template.name)
        end = self._eos if named is None else self.renderer.tokenizer.get_vocab().get(named, self._eos)
        if end is None:
            raise DataError("the tokenizer has no end-of-sequence token, which must follow each text in stage pt.")
        return end

    def _blocks(self, encoded: Sequence[EncodedRow]) -> list[EncodedRow]:
        """Texts end to end, cut every `cutoff_len` tokens; a last block that is not full is left out."""
        size = self.settings.cutoff_len
        bos_ids = token_ids(self._texts.bos_ids)
        joined = token_ids()
        for item in encoded:
            joined += item.sequences[""].ids
        ends, at = [], 0
        for item in encoded:
            at += item.length
            ends.append(at)
        blocks, document = [], 0
        for start in range(0, len(joined) - size + 1, size):
            tokens = Tokens()
            tokens.append(bos_ids + joined[start + len(bos_ids) : start + size], trained=True)
            first, at = document, start
            while at < start + size:
                stop = min(ends[document], start + size)
                tokens.documents.append(stop - at)
                at = stop
                document += stop == ends[document]
            blocks.append(EncodedRow({"": tokens}, encoded[first].row, size))
        return blocks

    # --- shared ------------------------------------------------------------------------------------------------------

    def _tokenise(self, parts: Iterable[Sequence[Segment]]) -> _SegmentIds:
        texts = {segment.text for part in parts for segment in part if segment.token_id is None}
        return _SegmentIds(self._texts.encode(texts))


class _SegmentIds:
    """Looks up the token ids of segments."""

    def __init__(self, table: Mapping[str, TokenIds]) -> None:
        self._table = table

    def __call__(self, segments: Sequence[Segment]) -> TokenIds:
        """The ids of all segments; not to be written to."""
        if len(segments) == 1 and segments[0].token_id is None:
            return self._table[segments[0].text]
        ids = token_ids()
        for segment in segments:
            if segment.token_id is None:
                ids += self._table[segment.text]
            else:
                ids.append(segment.token_id)
        return ids


def _prompted(prompt: TokenIds, response: TokenIds) -> Tokens:
    tokens = Tokens()
    tokens.append(prompt, trained=False)
    tokens.append(response, trained=True)
    return tokens


def _join(items: Sequence[EncodedRow]) -> EncodedRow:
    """Several rows as one sequence of documents."""
    joined = Tokens()
    for item in items:
        tokens = item.sequences[""]
        start = len(joined.ids)
        joined.ids += tokens.ids
        joined.spans += [start + position for position in tokens.spans]
        for position, label in zip(tokens.overrides[::2], tokens.overrides[1::2], strict=True):
            joined.overrides += (start + position, label)
        joined.documents.append(len(tokens.ids))
    return EncodedRow({"": joined}, items[0].row, len(joined.ids))


def _response(row: Row) -> Message:
    assert row.response is not None
    return row.response


def _rejected(row: Row) -> Message:
    assert row.rejected is not None
    return row.rejected
