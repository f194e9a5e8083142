"""What a workload of gpu.py is made of: the model's folder, the rows, and the same rows as tokens for the peers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from gpu_workloads import TINY_VOCABULARY, Data, Workload
from made_up_rows import write_rows
from word_tokenizer import random_text, save_tokenizer

MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"
VOCABULARY = 128_256
_ROWS: dict[Data, int] = {"text": 64, "pairs": 64}
_LONG = 32_768
"""From this length on a few rows are enough."""


def model_config(workload: Workload) -> dict[str, Any]:
    """The config.json of a workload's model."""
    content = json.loads((MODELS / workload.model / "config.json").read_text(encoding="utf-8"))
    return {**content, **workload.config}


def make_model(workload: Workload, work: Path, *, is_tiny: bool, tokenizer: Path | None) -> Path:
    """The folder of the model: config and tokenizer, and weights only where they are packed.

    Args:
        work: what lies there already is used again.
        tokenizer: folder of one to use; None for one of words.
    """
    kind = "nf4" if workload.nf4 else "shape"
    layers, positions = workload.config.get("num_hidden_layers", ""), workload.config.get("max_position_embeddings", "")
    folder = work / f"{workload.model}-{kind}-{layers}-{positions}"
    if (folder / "complete").exists():
        return folder
    words = tokenizer or save_tokenizer(work / "tokenizer", TINY_VOCABULARY if is_tiny else VOCABULARY)
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(workload)
    if workload.nf4:
        script = Path(__file__).with_name("nf4_model.py")
        # in a process of its own, which takes its share of the GPU's memory with it
        subprocess.run([sys.executable, str(script), str(folder), str(words), json.dumps(config)], check=True)
    else:
        for file in words.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "complete").touch()
    return folder


def make_data(workload: Workload, work: Path, *, is_tiny: bool) -> Path:
    """The folder of the rows with their dataset_info.json."""
    folder = work / f"data-{workload.data}-{workload.seq_len}"
    folder.mkdir(parents=True, exist_ok=True)
    if workload.data == "chat":
        write_rows(folder)
        return folder
    size = TINY_VOCABULARY if is_tiny else VOCABULARY
    source, length = random.Random(1), workload.seq_len
    count = 4 if length >= _LONG else _ROWS[workload.data]
    if workload.data == "text":
        rows = [{"text": random_text(source, length, size)} for _ in range(count)]
        info: dict[str, Any] = {"texts": {"file_name": "texts.json", "columns": {"prompt": "text"}}}
    else:  # prompts of less than half the length, and answers that are cut to what is left
        rows = [
            {
                "prompt": random_text(source, length * 2 // 5, size),
                "chosen": random_text(source, length, size),
                "rejected": random_text(source, length, size),
            }
            for _ in range(count)
        ]
        columns = {name: name for name in ("prompt", "chosen", "rejected")}
        info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (folder / f"{next(iter(info))}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def fourfold_config(workload: Workload, model: Path, data: Path, steps: int) -> dict[str, Any]:
    """The config file of Fourfold's side."""
    return {
        "do_train": True,
        "model_name_or_path": str(model),
        "dataset_dir": str(data),
        "output_dir": "",
        "overwrite_output_dir": True,
        **({} if workload.nf4 else {"train_from_scratch": True}),
        **({} if workload.data == "chat" else {"cutoff_len": workload.seq_len}),
        "max_grad_norm": 1.0,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "max_steps": steps,
        "torch_compile": True,  # as by default in a run that is not as short as a measurement
        **workload.keys,
    }


def write_peer_rows(config: dict[str, Any], steps: int, file: Path) -> None:
    """Write the samples of the first steps as tokens, in the order in which Fourfold trains them.

    Each is a mapping from role to `input_ids` and `labels`.
    """
    from fourfold.config.load import load
    from fourfold.dataset.loader import StepLoader
    from fourfold.dataset.prepare import prepare
    from fourfold.models.renderer import load_renderer

    run = load({**config, "output_dir": str(file.parent / "nothing")}, verb="train")
    data = prepare(run, *load_renderer(run)).train
    assert data is not None
    training = run.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    loader = StepLoader(data, per_step, seed=training.seed)
    rows = [
        {role: {"input_ids": row.input_ids, "labels": row.labels} for role, row in sample.sequences.items()}
        for step in islice(loader.steps(), steps)
        for sample in step.samples
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
