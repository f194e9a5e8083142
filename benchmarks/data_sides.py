"""What each side of data_speed.py does.

python benchmarks/data_sides.py SIDE ROWS.jsonl TOKENIZER WORKERS RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CUTOFF = 2048
CHUNK = 1000
"""Rows of a batch, which is packed by itself, on both sides."""
_IGNORED = -100
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."


def fourfold(file: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """The dataset path of `fourfold train`."""
    from fourfold.base.log import setup_logging
    from fourfold.config.load import load
    from fourfold.dataset.prepare import prepare
    from fourfold.models.renderer import load_renderer

    setup_logging()
    config = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(tokenizer),
        "template": "smollm2",
        "dataset_dir": str(file.parent),
        "dataset": "instructions",
        "cutoff_len": CUTOFF,
        "packing": True,
        "preprocessing_num_workers": workers,
        "preprocessing_batch_size": CHUNK,
        "output_dir": str(file.parent / "output"),
    }
    run = load(config, verb="train")
    made_with = load_renderer(run)
    started = time.perf_counter()
    data = prepare(run, *made_with).train
    seconds = time.perf_counter() - started
    assert data is not None
    return {"seconds": seconds, "packs": len(data), "targets": int(data.num_targets.sum())}


def datasets_map(file: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """Two maps: rows to messages; batches of messages to packs, a call of the tokenizer for each part of a turn."""
    import numpy as np
    from datasets import load_dataset
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train", num_proc=workers)
    messages = rows.map(to_messages, remove_columns=rows.column_names, num_proc=workers)
    packs = messages.map(
        pack_batch,
        batched=True,
        batch_size=CHUNK,
        remove_columns=messages.column_names,
        num_proc=workers,
        fn_kwargs={"tokenizer": loaded},
    )
    seconds = time.perf_counter() - started
    targets = sum(
        int((np.asarray(batch["labels"]) != _IGNORED).sum()) for batch in packs.with_format("numpy").iter(CHUNK)
    )
    return {"seconds": seconds, "packs": len(packs), "targets": targets}


def to_messages(row: dict[str, str]) -> dict[str, Any]:
    """An alpaca row as messages."""
    content = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return {
        "prompt": [{"role": "user", "content": content}],
        "response": [{"role": "assistant", "content": row["output"]}],
        "system": "",
        "tools": "",
    }


def encode_row(prompt: list[dict[str, str]], response: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], ...]:
    """Token ids of the prompt and of the answer of a row of one turn."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    system = encode(f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n")
    question = encode(f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n")
    return system + question, encode(f"{response[0]['content']}<|im_end|>\n")


def pack_batch(batch: dict[str, list[Any]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """A batch of rows as packs of the full length, padded."""
    from fourfold.dataset.encode import share_length
    from fourfold.dataset.pack import pack_lengths

    encoded: list[tuple[list[int], list[int]]] = []
    for prompt, response in zip(batch["prompt"], batch["response"], strict=True):
        source, target = encode_row(prompt, response, tokenizer)
        kept_source, kept_target = share_length(len(source), len(target), CUTOFF - 1)
        source, target = source[:kept_source], target[:kept_target]
        encoded.append((source + target, [_IGNORED] * len(source) + target))
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    packs: dict[str, list[list[int]]] = {name: [] for name in names}
    for chosen in pack_lengths([len(ids) for ids, _ in encoded], CUTOFF - 1):
        input_ids: list[int] = []
        labels: list[int] = []
        position_ids: list[int] = []
        for number in chosen:
            ids, trained = encoded[number]
            input_ids += ids
            labels += trained
            position_ids += range(len(ids))
        padding = CUTOFF - len(input_ids)
        packs["input_ids"].append(input_ids + [tokenizer.pad_token_id or 0] * padding)
        packs["labels"].append(labels + [_IGNORED] * padding)
        packs["position_ids"].append(position_ids + [0] * padding)
        packs["attention_mask"].append([1] * CUTOFF)
    return packs


SIDES: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {"fourfold": fourfold, "datasets_map": datasets_map}


def main() -> None:
    side, file, tokenizer, workers, result = sys.argv[1:]
    found = SIDES[side](Path(file), Path(tokenizer), int(workers))
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
