"""Data across processes: the pool that tokenises, and a cache whose writer is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from byte_tokenizer import make_byte_tokenizer
from data_folder import alpaca_rows, make_run, write_set
from fourfold.base.errors import DataError
from fourfold.dataset.cache import load_or_write
from fourfold.dataset.encode import Encoder, EncodeSettings
from fourfold.dataset.info import DatasetEntry
from fourfold.dataset.prepare import open_mix
from fourfold.dataset.raw import RawChunk, RawMix
from fourfold.dataset.render import Renderer
from fourfold.dataset.template import load_template
from fourfold.dataset.tokenise import ChunkResult, ChunkTokeniser
from fourfold.dataset.workers import run_chunks

SLOW_WRITER = """
import sys, time
from pathlib import Path
from fourfold.dataset.cache import load_or_write
def write(folder):
    (folder / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
load_or_write(Path(sys.argv[1]), write)
"""


NUM_ROWS = 300


class SlowHere(ChunkTokeniser):
    """Slow in the process that made it, so that the others have started before all is done."""

    def __init__(self, encoder: Encoder, entries: Sequence[DatasetEntry], *, skip_bad_rows: bool) -> None:
        super().__init__(encoder, entries, skip_bad_rows=skip_bad_rows)
        self.home, self.chunks_here = os.getpid(), 0

    def run(self, chunk: RawChunk) -> ChunkResult:
        if os.getpid() == self.home:
            self.chunks_here += 1
            time.sleep(0.2)
        return super().run(chunk)


def make_job(folder: Path, kind: type[ChunkTokeniser] = SlowHere) -> tuple[RawMix, ChunkTokeniser]:
    mix = open_mix(make_run(folder), ("a",), "sft", key="dataset")
    assert mix is not None
    tokenizer = make_byte_tokenizer("<|im_start|>", "<|im_end|>")
    encoder = Encoder(Renderer(load_template("chatml", tokenizer), tokenizer), EncodeSettings("chat", 100))
    return mix, kind(encoder, mix.entries, skip_bad_rows=False)


def test_run_chunks_when_in_other_processes_gives_the_same_in_order(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(NUM_ROWS))
    here = list(run_chunks(*make_job(folder, ChunkTokeniser), chunk_rows=3, workers=1))
    mix, tokeniser = make_job(folder)
    there = list(run_chunks(mix, tokeniser, chunk_rows=3, workers=2))
    assert [result.batch for result in here] == [result.batch for result in there]
    assert [result.stats for result in here] == [result.stats for result in there]
    assert isinstance(tokeniser, SlowHere)
    assert 0 < tokeniser.chunks_here < len(here)


def test_run_chunks_when_done_before_the_others_have_started_gives_the_same(tmp_path: Path) -> None:
    mix, tokeniser = make_job(write_set(tmp_path, "a", alpaca_rows(20)), ChunkTokeniser)
    here = list(run_chunks(mix, tokeniser, chunk_rows=1, workers=1))
    assert [result.batch for result in here] == [
        result.batch for result in run_chunks(mix, tokeniser, chunk_rows=1, workers=2)
    ]


def test_worker_when_imported_does_without_torch() -> None:
    told = "import sys, fourfold.dataset.worker; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, check=True, text=True).stdout == "False\n"


def test_run_chunks_when_a_row_is_bad_in_another_process_names_it(tmp_path: Path) -> None:
    rows = alpaca_rows(NUM_ROWS)
    del rows[-1]["output"]
    mix, tokeniser = make_job(write_set(tmp_path, "a", rows))
    with pytest.raises(DataError, match=rf"a.json, row {NUM_ROWS}: 'output' is missing") as caught:
        list(run_chunks(mix, tokeniser, chunk_rows=4, workers=2))
    assert caught.value.row == NUM_ROWS - 1


class Deadly(SlowHere):
    """Stands for a chunk for which the system has not enough memory."""

    def run(self, chunk: RawChunk) -> ChunkResult:
        if os.getpid() != self.home:
            os.kill(os.getpid(), 9)
        return super().run(chunk)


def test_run_chunks_when_a_worker_is_killed_says_so(tmp_path: Path) -> None:
    mix, deadly = make_job(write_set(tmp_path, "a", alpaca_rows(NUM_ROWS)), Deadly)
    with pytest.raises(DataError, match=r"ended by signal 9. *Most often memory ran out"):
        list(run_chunks(mix, deadly, chunk_rows=3, workers=2))


def test_load_or_write_when_the_writer_is_killed_starts_anew(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "a")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert not (tmp_path / "a").exists()
    load_or_write(tmp_path / "a", lambda folder: (folder / "data").write_text("whole"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["data"]
