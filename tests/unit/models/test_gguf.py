from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from fourfold.base.errors import ModelError
from fourfold.config.model import ModelConfig
from fourfold.models.gguf import dequantize, read_gguf
from fourfold.models.gguf_model import load_gguf_config, load_gguf_weights, sample_gguf_weights
from fourfold.models.load import load_model
from tiny_models import tiny_model

HEADS, KV_HEADS = 4, 2


def _pairwise(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from Transformers' rotary order to llama.cpp's, as its converter does."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def _write(
    path: Path,
    model: PreTrainedModel,
    *,
    skip: str = "",
    theta: float = 10000.0,
    rope_factors: np.ndarray | None = None,
) -> Path:
    """A GGUF file of a tiny llama, as llama.cpp's converter would write it."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("some.strings", ["a", "b c", "ü"])
    writer.add_array("some.numbers", [1, 2, 3])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        values = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = _pairwise(values, HEADS if "q_proj" in name else KV_HEADS)
        theirs = f"{names.get_name(stem)}.{suffix}"
        if theirs == skip:
            continue
        if "down_proj" in name:  # 48 columns do not fit blocks of 32; everything of 32 columns does
            writer.add_tensor(theirs, values.astype(np.float16))
        elif "up_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", rms_norm_eps=1e-5)


def test_read_gguf_reads_metadata_and_tensors_as_the_gguf_package_does(tmp_path: Path, model: PreTrainedModel) -> None:
    file = read_gguf(_write(tmp_path / "a.gguf", model))
    reference = gguf.GGUFReader(str(file.path))
    assert file.metadata["some.strings"] == ["a", "b c", "ü"]
    assert file.metadata["some.numbers"] == [1, 2, 3]
    assert file.architecture == "llama"
    assert set(file.tensors) == {tensor.name for tensor in reference.tensors}
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.offset == tensor.data_offset
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(dequantize(file, info).numpy(), expected)


def test_load_gguf_gives_the_model_that_was_written(tmp_path: Path, model: PreTrainedModel) -> None:
    path = _write(tmp_path / "a.gguf", model)
    config = load_gguf_config(path)
    assert config.rms_norm_eps == 1e-5
    assert not config.tie_word_embeddings
    weights = load_gguf_weights(path, config)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    loaded = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights)
    ids = torch.arange(12)[None]
    # up_proj went through 8 bits, down_proj through fp16; a wrong row order would be off by whole units.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(weights[name], model.get_parameter(name).data, rtol=0, atol=0)


def test_sample_gguf_weights_takes_rows_in_transformers_order(tmp_path: Path, model: PreTrainedModel) -> None:
    samples = {name: values for name, _, values in sample_gguf_weights(_write(tmp_path / "a.gguf", model))}
    weight = model.get_parameter("model.layers.1.self_attn.k_proj.weight")
    torch.testing.assert_close(
        samples["model.layers.1.self_attn.k_proj.weight"], weight[[0, 8, 15]].flatten(), rtol=0, atol=0
    )


def test_load_gguf_weights_when_a_tensor_is_missing_names_it(tmp_path: Path, model: PreTrainedModel) -> None:
    path = _write(tmp_path / "a.gguf", model, skip="blk.1.ffn_gate.weight")
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_gate\.weight is missing"):
        load_gguf_weights(path, load_gguf_config(path))


# Theta 500000 and head_dim 8: wavelengths 2 pi 500000^(i/4) = 6.28, 167.08, 4442.88, 118142 against 8192 positions.
# The third lies between 8192/4 and 8192: s = (8192/4442.88 - 1)/3 = 0.281280, 1/((1 - s)/8 + s) = 2.694576.
LLAMA3_FACTORS = np.array([1, 1, 2.694576, 8], dtype=np.float32)


def test_load_gguf_config_with_rope_factors_restores_llama3_scaling(tmp_path: Path, model: PreTrainedModel) -> None:
    path = _write(tmp_path / "a.gguf", model, theta=500000.0, rope_factors=LLAMA3_FACTORS)
    assert load_gguf_config(path).rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_load_gguf_config_with_other_rope_factors_refuses(tmp_path: Path, model: PreTrainedModel) -> None:
    path = _write(tmp_path / "a.gguf", model, theta=10000.0, rope_factors=LLAMA3_FACTORS)
    with pytest.raises(ModelError, match="not llama3 scaling"):
        load_gguf_config(path)


def test_read_gguf_when_there_is_no_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*nowhere\.gguf"):
        read_gguf(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\x03\x00\x00\x00\xff"])
def test_read_gguf_when_damaged_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged or no GGUF file"):
        read_gguf(path)


def test_load_gguf_weights_when_cut_short_says_which_tensor(tmp_path: Path, model: PreTrainedModel) -> None:
    path = _write(tmp_path / "a.gguf", model)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="cannot be read"):
        load_gguf_weights(path, load_gguf_config(path))


def test_load_gguf_of_another_architecture_goes_through_transformers(tmp_path: Path) -> None:
    model = tiny_model("gemma2", query_pre_attn_scalar=256)  # the file does not carry it, the loader assumes 256
    config, path = model.config, tmp_path / "gemma2.gguf"
    writer = gguf.GGUFWriter(str(path), "gemma2")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(16)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        values = parameter.detach().numpy()
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values + 1 if "norm" in name else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_model(ModelConfig(model_name_or_path=str(path)), dtype=torch.float32, device=torch.device("cpu"))
    assert loaded.config.rms_norm_eps == 1e-6
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "saved")
