"""Small data folders for tests, and runs that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from byte_tokenizer import make_byte_tokenizer
from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.dataset.prepare import Prepared, prepare
from fourfold.dataset.render import Renderer
from fourfold.dataset.template import load_template


def alpaca_rows(number: int, *, answer: str = "answer") -> list[dict[str, Any]]:
    """Rows of instruction, input and output that differ from each other."""
    return [{"instruction": f"question {n}", "input": "", "output": f"{answer} {n}"} for n in range(number)]


def write_rows(path: Path, rows: Any) -> Path:
    """Write rows as a JSON array, or as lines if the path ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def write_set(folder: Path, name: str, rows: Any, *, file: str | None = None, **entry: Any) -> Path:
    """Add a data set to a folder: its file and its entry in dataset_info.json. Returns the folder."""
    file_name = file or f"{name}.json"
    write_rows(folder / file_name, rows)
    info_file = folder / "dataset_info.json"
    info = json.loads(info_file.read_text(encoding="utf-8")) if info_file.exists() else {}
    info_file.write_text(json.dumps({**info, name: {"file_name": file_name, **entry}}), encoding="utf-8")
    return folder


def make_run(folder: Path, **keys: Any) -> Run:
    """A run on a data folder."""
    defaults = {"stage": "sft", "template": "chatml", "model_name_or_path": "none", "output_dir": str(folder / "out")}
    return load({**defaults, "dataset_dir": str(folder), **keys})


def prepare_run(folder: Path, **keys: Any) -> Prepared:
    """Prepare a run's data with a tokenizer of bytes, chatml's markers being one token each."""
    run = make_run(folder, **keys)
    tokenizer = make_byte_tokenizer("<|im_start|>", "<|im_end|>")
    return prepare(run, tokenizer, Renderer(load_template(run.data.template, tokenizer), tokenizer))
