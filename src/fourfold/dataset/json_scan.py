"""Finding the rows of a JSON file without holding the file: one pass, bounded memory, exact error lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fourfold.base.errors import DataError

CHUNK_BYTES = 1 << 22
"""Bytes read at a time."""

_BLANK = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_BOM = codecs.BOM_UTF8


class _Window:
    """A sliding window of decoded text over a file; knows byte offset and line of where it starts."""

    def __init__(self, path: Path, file: BinaryIO, chunk_bytes: int) -> None:
        self._path, self._file, self._chunk_bytes = path, file, chunk_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at_end = "", False
        self.start_byte = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(self.start_byte)
        self._start_line = 1

    def grow(self) -> None:
        """Read on; at least doubles the window, so that a long row costs no more than twice its length."""
        chunk = self._file.read(max(self._chunk_bytes, len(self.text)))
        self.at_end = not chunk
        try:
            self.text += self._decoder.decode(chunk, final=self.at_end)
        except UnicodeDecodeError as error:
            raise DataError(
                f"is not UTF-8 text ({error.reason}). Save the file as UTF-8.", file=str(self._path)
            ) from error

    def drop(self, num_chars: int, num_bytes: int) -> None:
        """Forget the first `num_chars` characters, which are `num_bytes` bytes."""
        self._start_line += self.text.count("\n", 0, num_chars)
        self.text = self.text[num_chars:]
        self.start_byte += num_bytes

    def fail(self, message: str, position: int) -> DataError:
        """The error for character `position` of the window."""
        line = self._start_line + self.text.count("\n", 0, position)
        return DataError(f"bad JSON in line {line}: {message}. Correct this line.", file=str(self._path))


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _is_cut_off(error: json.JSONDecodeError, window: _Window) -> bool:
    """Whether more text may settle the error: it is at the very end, or in a string that is not closed yet."""
    return not window.at_end and (error.pos >= len(window.text) - 16 or error.msg.startswith("Unterminated"))


def scan_rows(path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[Any, int, int]]:
    """Each row of a JSON file with the bytes where it starts and stops.

    The file holds either one array of rows, or rows one after the other (JSON lines, or pretty-printed).

    Raises:
        DataError: bad JSON, with the line; or a file that is not UTF-8.
    """
    with path.open("rb") as file:
        window = _Window(path, file, chunk_bytes)
        first = 0
        while first == len(window.text):
            if window.at_end:
                return
            window.grow()
            first = _BLANK.match(window.text).end()  # pyright: ignore[reportOptionalMemberAccess] - matches always
        in_array = window.text[first] == "["
        yield from _scan(window, first + 1 if in_array else first, in_array=in_array)


def _scan(window: _Window, position: int, *, in_array: bool) -> Iterator[tuple[Any, int, int]]:
    decode = json.JSONDecoder().raw_decode
    counted, byte = 0, window.start_byte  # `byte` is where character `counted` of the window lies in the file
    while True:
        start = _BETWEEN.match(window.text, position).end()  # pyright: ignore[reportOptionalMemberAccess]
        ended = start >= len(window.text)
        if ended and not window.at_end:
            window.grow()
            continue
        if in_array and not ended and window.text[start] == "]":
            _check_rest(window, start + 1)
            return
        if ended:
            if in_array:
                raise window.fail("the array is not closed", len(window.text))
            return
        try:
            row, stop = decode(window.text, start)
        except json.JSONDecodeError as error:
            if _is_cut_off(error, window):
                window.drop(start, byte - window.start_byte + _num_bytes(window.text[counted:start]))
                position, counted, byte = 0, 0, window.start_byte
                window.grow()
                continue
            raise window.fail(error.msg, error.pos) from error
        first_byte = byte + _num_bytes(window.text[counted:start])
        counted, byte = stop, first_byte + _num_bytes(window.text[start:stop])
        yield row, first_byte, byte
        position = stop


def _check_rest(window: _Window, position: int) -> None:
    while True:
        end = _BLANK.match(window.text, position).end()  # pyright: ignore[reportOptionalMemberAccess]
        if end < len(window.text):
            raise window.fail("text after the end of the array", end)
        if window.at_end:
            return
        window.grow()
