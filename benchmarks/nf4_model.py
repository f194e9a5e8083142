"""A model folder of a llama's shape with random weights, packed to nf4 as bitsandbytes' own checkpoints are.

    python benchmarks/nf4_model.py FOLDER TOKENIZER '{"hidden_size": 4096, ...}'

Written layer by layer, so that the plain weights never exist together.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

_STD = 0.02
"""Of every weight; the usual initialisation."""


def write_nf4_model(folder: Path, config: LlamaConfig, tokenizer: Path, device: torch.device, seed: int = 0) -> None:
    """Write config, tokenizer and weights, one file a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    _write_config(folder, config)
    generator = torch.Generator(device).manual_seed(seed)
    index: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(_shards(config, generator)):
        name = f"model-{number + 1:05d}.safetensors"
        on_host = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(on_host, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(on_host, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in on_host.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def _write_config(folder: Path, config: LlamaConfig) -> None:
    config.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _shards(config: LlamaConfig, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    head = config.head_dim or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, (config.num_key_value_heads or 0) * head
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    vocabulary = (config.vocab_size, hidden)
    yield {"model.embed_tokens.weight": _random(vocabulary, generator), "model.norm.weight": ones}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {prefix + "input_layernorm.weight": ones, prefix + "post_attention_layernorm.weight": ones.clone()}
        for name, shape in linears.items():
            tensors |= _packed(f"{prefix}{name}.weight", _random(shape, generator))
        yield tensors
    yield {"lm_head.weight": _random(vocabulary, generator)}


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=generator.device).normal_(0.0, _STD, generator=generator)


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The weight and what is needed to expand it, under the names of bitsandbytes' serialisation."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer", type=Path, help="folder of the tokenizer")
    parser.add_argument("config", help="content of the config.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_nf4_model(args.folder, LlamaConfig(**json.loads(args.config)), args.tokenizer, device)


if __name__ == "__main__":
    main()
