"""Instruction rows by the million: lengths as alpaca's, words of a tokenizer's vocabulary, as frequent as words are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_CHUNK = 10_000
_MEAN_PROMPT, _MEAN_ANSWER = 18, 100
"""Words; alpaca's answers are about 100 tokens long, most shorter and some much longer."""


def save_smollm2_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, taken from its GGUF file and written into a folder as Transformers has it."""
    from fourfold.config.model import ModelConfig
    from fourfold.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(MODEL)))
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_instructions(file: Path, rows: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
    """Write `instruction`, `input` and `output` as JSON lines, and a dataset_info.json beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    words = np.array([token[1:] for token in sorted(tokenizer.get_vocab()) if token[0] == "Ġ" and token[1:].isalpha()])
    source = np.random.default_rng(seed)
    source.shuffle(words)
    shares = 1 / np.arange(1, len(words) + 1)  # Zipf's law
    ends = np.cumsum(shares / shares.sum())
    part = file.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        for start in range(0, rows, _CHUNK):
            number = min(_CHUNK, rows - start)
            prompts = 4 + source.poisson(_MEAN_PROMPT - 4, number)
            answers = 1 + source.exponential(_MEAN_ANSWER - 1, number).astype(int)
            chosen = words[np.searchsorted(ends, source.random(int(prompts.sum() + answers.sum())))].tolist()
            at = 0
            for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
                instruction, output = chosen[at : at + prompt], chosen[at + prompt : at + prompt + answer]
                at += prompt + answer
                row = {"instruction": " ".join(instruction), "input": "", "output": " ".join(output)}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(file)
    info = {"instructions": {"file_name": file.name}}
    (file.parent / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
