"""Small complete training runs for tests: a model folder, a data set, a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourfold.config.load import load
from fourfold.training.run import train

_WORDS = (
    *("the", "a", "small", "red", "blue", "house", "tree", "runs", "sleeps", "sings", "over", "under", "near", "with"),
    *("and", "then", "slowly", "again"),
)


def write_dataset(folder: Path, num_rows: int = 22) -> None:
    """Data sets of rows of different lengths, with their entries.

    `tiny` alpaca, `tiny_text` plain text, `tiny_pairs` pairs of answers, `tiny_tags` answers tagged good or bad.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_rows):
        words = [_WORDS[(i * 7 + 3 * k) % len(_WORDS)] for k in range(3 + (i * 5) % 11)]
        rows.append({"instruction": f"Say {' '.join(words[:2])}", "input": "", "output": " ".join(words) + "."})
    (folder / "tiny.json").write_text(json.dumps(rows), encoding="utf-8")
    texts = [{"text": " ".join([row["output"]] * 4)} for row in rows]
    (folder / "tiny_text.jsonl").write_text("\n".join(json.dumps(row) for row in texts), encoding="utf-8")
    pairs = [
        {"instruction": row["instruction"], "chosen": row["output"], "rejected": " ".join(row["output"].split()[::-1])}
        for row in rows
    ]
    (folder / "tiny_pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    tags = [{**row, "label": number % 3 > 0} for number, row in enumerate(rows)]
    (folder / "tiny_tags.json").write_text(json.dumps(tags), encoding="utf-8")
    info = {
        "tiny": {"file_name": "tiny.json"},
        "tiny_text": {"file_name": "tiny_text.jsonl", "columns": {"prompt": "text"}},
        "tiny_pairs": {
            "file_name": "tiny_pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "tiny_tags": {
            "file_name": "tiny_tags.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"},
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def config(model: Path, data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """A LoRA SFT run of 12 steps in fp32 that logs every step."""
    return {
        "model_name_or_path": str(model),
        "dataset_dir": str(data),
        "dataset": "tiny",
        "template": "auto",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "cutoff_len": 64,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "output_dir": str(output),
        **overrides,
    }


def run(model: Path, data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """Train and return the results."""
    return train(load(config(model, data, output, **overrides), verb="train"))


def losses(output: Path, key: str = "loss") -> list[float]:
    """The training losses that a run logged, one a step, or another figure of its log."""
    lines = (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]
