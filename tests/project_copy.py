"""A copy of the project as its users see it, in which every config trains a tiny model for a few steps.

Commands of the documentation and the examples run in it word for word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from fourfold.cli.main import app
from fourfold.config.sources import read_file
from tiny_models import save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".yaml", ".json"))

_LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_SHORT = {"max_samples": 12, "num_train_epochs": 1, "logging_steps": 1, "cutoff_len": 128, "max_new_tokens": 4}


def make_project(folder: Path) -> Path:
    """Write the copy: the examples, shortened, the data as it is, and the model that all of them name."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(_LLAMA3_TOKENS, special_tokens=True)
    save_tiny_model(folder / "model", tokenizer=tokenizer)
    (folder / "examples").mkdir()
    for name in EXAMPLES:
        write_config(folder / "examples" / name, read_file(ROOT / "examples" / name))
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def write_config(path: Path, keys: Mapping[str, Any]) -> None:
    """Write a config with the tiny model in place of its own, and short; fp16 only where there is a GPU."""
    changed = {**keys, **_SHORT, "model_name_or_path": "model"}
    if "max_steps" in keys:
        changed["max_steps"] = 2
    if "teacher_model" in keys:
        changed["teacher_model"] = "model"
    if keys.get("fp16") and not torch.cuda.is_available():
        changed |= {"fp16": False}
    text = json.dumps(changed) if path.suffix == ".json" else yaml.safe_dump(changed)
    path.write_text(text, encoding="utf-8")


def run_command(project: Path, *words: str, typed: str = "") -> Result:
    """Run `fourfold WORDS` in the copy, in this process, which has torch loaded already.

    Args:
        typed: standard input, for chat.
    """
    with in_project(project):
        return CliRunner().invoke(app, list(words), input=typed, prog_name="fourfold")


@contextmanager
def in_project(project: Path) -> Iterator[None]:
    """Within it the working directory and the cache are the copy's; afterwards both, and logging, are as before."""
    log = logging.getLogger("fourfold")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    before, cache = Path.cwd(), os.environ.get("FOURFOLD_CACHE")
    os.chdir(project)
    os.environ["FOURFOLD_CACHE"] = str(project / "cache")
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.pop("FOURFOLD_CACHE")
        if cache is not None:
            os.environ["FOURFOLD_CACHE"] = cache
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)
