"""Data across processes: the pool that tokenises, and a cache whose writer is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from byte_tokenizer import make_byte_tokenizer
from data_folder import alpaca_rows, make_run, write_set
from fourfold.base.errors import DataError
from fourfold.dataset.cache import load_or_write
from fourfold.dataset.encode import Encoder, EncodeSettings
from fourfold.dataset.prepare import open_mix
from fourfold.dataset.raw import RawChunk, RawMix
from fourfold.dataset.render import Renderer
from fourfold.dataset.template import load_template
from fourfold.dataset.tokenise import ChunkTokeniser
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


def make_job(folder: Path) -> tuple[RawMix, ChunkTokeniser]:
    mix = open_mix(make_run(folder), ("a",), "sft", key="dataset")
    assert mix is not None
    tokenizer = make_byte_tokenizer("<|im_start|>", "<|im_end|>")
    encoder = Encoder(Renderer(load_template("chatml", tokenizer), tokenizer), EncodeSettings("chat", 100))
    return mix, ChunkTokeniser(encoder, mix.entries, skip_bad_rows=False)


def test_run_chunks_when_in_other_processes_gives_the_same_in_order(tmp_path: Path) -> None:
    mix, tokeniser = make_job(write_set(tmp_path, "a", alpaca_rows(50)))
    here = list(run_chunks(mix, tokeniser, chunk_rows=3, workers=1))
    there = list(run_chunks(mix, tokeniser, chunk_rows=3, workers=2))
    assert [result.batch for result in here] == [result.batch for result in there]
    assert [result.stats for result in here] == [result.stats for result in there]


def test_run_chunks_when_a_row_is_bad_in_another_process_names_it(tmp_path: Path) -> None:
    rows = alpaca_rows(40)
    del rows[30]["output"]
    mix, tokeniser = make_job(write_set(tmp_path, "a", rows))
    with pytest.raises(DataError, match=r"a.json, row 30: 'output' is missing") as caught:
        list(run_chunks(mix, tokeniser, chunk_rows=4, workers=2))
    assert caught.value.row == 30


class Deadly(ChunkTokeniser):
    """Stands for a chunk for which the system has not enough memory."""

    def run(self, chunk: RawChunk) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        os.kill(os.getpid(), 9)


def test_run_chunks_when_a_worker_is_killed_says_so(tmp_path: Path) -> None:
    mix, tokeniser = make_job(write_set(tmp_path, "a", alpaca_rows(40)))
    deadly = Deadly(tokeniser.encoder, tokeniser.entries, skip_bad_rows=False)
    with pytest.raises(DataError, match=r"ended by signal 9. *Most often memory ran out"):
        list(run_chunks(mix, deadly, chunk_rows=20, workers=2))


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
