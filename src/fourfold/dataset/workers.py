"""Running the chunks of a data set: here, or in a bounded pool of processes."""

from __future__ import annotations

from collections.abc import Iterator

from fourfold.dataset.tokenise import ChunkResult, ChunkTokeniser, RowReaderOf


def run_chunks(
    mix: RowReaderOf, tokeniser: ChunkTokeniser, *, chunk_rows: int, workers: int | None, title: str
) -> Iterator[ChunkResult]:
    """The results of all chunks, in order."""
    for start in range(0, len(mix), chunk_rows):
        yield tokeniser.run(mix.read(start, min(start + chunk_rows, len(mix))))
