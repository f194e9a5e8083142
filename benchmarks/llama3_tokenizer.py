"""Make a Llama-3 tokenizer folder from the `tokenizer.model` inside the PyPI wheel `llama-models`.

pip download --no-deps --dest DIR llama-models==0.3.0
python benchmarks/llama3_tokenizer.py DIR/llama_models-0.3.0-py3-none-any.whl FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

_MEMBER = "llama_models/llama3/tokenizer.model"
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_NAMED = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>"),
)
_NUM_SPECIAL = 256


def convert(wheel: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of Llama 3 with its 256 special tokens, 128,256 in all."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + _NUM_SPECIAL - len(_NAMED))]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        vocabulary = archive.extract(_MEMBER, folder)
        converter = TikTokenConverter(
            vocab_file=vocabulary, pattern=_PATTERN, extra_special_tokens=[*_NAMED, *reserved]
        )
        converted = converter.converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=converted,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    tokenizer = convert(args.wheel)
    tokenizer.save_pretrained(args.folder)
    print(f"{len(tokenizer)} tokens, saved at {args.folder}")


if __name__ == "__main__":
    main()
