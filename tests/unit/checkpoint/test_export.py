import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fourfold.base.errors import CheckpointError, ConfigError, ModelError
from fourfold.checkpoint.compare import compare
from fourfold.checkpoint.export import Exported, export, merge
from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.dataset.rows import Message
from fourfold.models.adapters import attach
from fourfold.models.identity import identify
from fourfold.models.load import load_model
from fourfold.models.patches import peft_noise_ignored
from fourfold.models.renderer import load_renderer
from fourfold.models.weights import save_model
from tiny_models import save_tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """A random adapter of `base`, as training saves it."""
    run = load({"model_name_or_path": str(base)})
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    with peft_noise_ignored():
        model = get_peft_model(load_model(run.model, dtype=torch.float32, device=CPU), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(model, folder, base=identify(run.model))
    return folder


def run_of(base: Path, folder: Path, **keys: Any) -> Run:
    config = {"model_name_or_path": str(base), "export_dir": str(folder), "template": "chatml", "use_cpu": True}
    return load({**config, **keys}, verb="export")


def logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).logits[0].float()


PROMPT = [5, 60, 61, 90, 33, 200]


@pytest.fixture(scope="module")
def exported(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("out") / "merged"
    return export(run_of(base, folder, adapter_name_or_path=str(adapter), default_system="Be brief."))


def test_export_merges_the_adapter(base: Path, adapter: Path, exported: Exported):
    run = load({"model_name_or_path": str(base), "adapter_name_or_path": str(adapter)})
    plain = load_model(run.model, dtype=torch.float32, device=CPU)
    without = logits(plain, PROMPT)
    expected = logits(attach(plain, run.model, run.tuning, trainable=False), PROMPT)
    found = logits(AutoModelForCausalLM.from_pretrained(exported.folder), PROMPT)
    assert (found - expected).abs().max() < 1e-4
    assert (found - without).abs().max() > 1e-2
    assert exported.comparison.largest < 1e-4
    assert exported.comparison.agreeing == exported.comparison.positions
    assert exported.dtype == torch.float32


def test_export_writes_what_others_load(base: Path, exported: Exported):
    names = {path.name for path in exported.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"adapter_config.json", "manifest.json", "pytorch_model.bin"}
    assert [path.name for path in exported.folder.parent.iterdir()] == [exported.folder.name]
    config = json.loads((exported.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["use_cache"] is True
    assert len({path.stat().st_mode for path in exported.folder.iterdir()}) == 1


def test_exported_chat_template_gives_the_tokens_of_training(base: Path, exported: Exported):
    _, renderer = load_renderer(run_of(base, exported.folder, default_system="Be brief."))
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    chat = [{"role": "user", "content": "Who are you?"}]
    found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert found == renderer.encode_prompt([Message.of("user", "Who are you?")])
    assert "Be brief." in tokenizer.decode(found)
    assert tokenizer.padding_side == "left"
    generation = GenerationConfig.from_pretrained(exported.folder)
    stops = generation.eos_token_id
    assert (stops if isinstance(stops, list) else [stops]) == list(renderer.stop_token_ids)


@pytest.mark.parametrize(("infer_dtype", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_export_without_an_adapter_casts_the_model(base: Path, tmp_path: Path, infer_dtype: str, dtype: torch.dtype):
    result = export(run_of(base, tmp_path / "out", infer_dtype=infer_dtype))
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert result.dtype == dtype
    assert result.comparison.largest < 0.05 * result.comparison.scale


@pytest.mark.parametrize("bits", [4, 8])
def test_export_of_a_quantised_run_is_plain_bf16(base: Path, adapter: Path, tmp_path: Path, bits: int):
    run = run_of(base, tmp_path / "out", adapter_name_or_path=str(adapter), quantization_bit=bits)
    result = export(run)
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((result.folder / "config.json").read_text())
    assert result.comparison.largest < 0.1 * result.comparison.scale
    quantised = attach(load_model(run.model, dtype=torch.bfloat16, device=CPU), run.model, run.tuning, trainable=False)
    expected = logits(quantised, PROMPT)
    assert (logits(model, PROMPT) - expected).abs().max() < 0.1 * expected.abs().max()


def test_export_merges_several_adapters_in_their_order(base: Path, adapter: Path, tmp_path: Path):
    first = load({"model_name_or_path": str(base), "adapter_name_or_path": str(adapter)})
    with peft_noise_ignored():
        model = attach(
            load_model(first.model, dtype=torch.float32, device=CPU), first.model, first.tuning, trainable=False
        )
        merged = merge(model)
        vars(merged).pop("peft_config", None)
        second = get_peft_model(merged, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    expected = logits(second, PROMPT)
    save_model(second, tmp_path / "second", base=identify(first.model, (str(adapter),)))
    names = f"{adapter},{tmp_path / 'second'}"
    result = export(run_of(base, tmp_path / "out", adapter_name_or_path=names))
    assert (logits(AutoModelForCausalLM.from_pretrained(result.folder), PROMPT) - expected).abs().max() < 1e-4


def test_export_refuses_an_adapter_of_another_base(adapter: Path, tmp_path: Path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="adapter_name_or_path: "):
        export(run_of(other, tmp_path / "out", adapter_name_or_path=str(adapter)))
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_used_folder_unless_told(base: Path, tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"export_dir: .*out is not empty.*overwrite_output_dir: true"):
        export(run_of(base, folder))
    export(run_of(base, folder, overwrite_output_dir=True))
    assert (folder / "config.json").exists()
    assert not (folder / "notes.txt").exists()


@pytest.mark.parametrize("keys", [{}, {"overwrite_output_dir": True}])
def test_export_never_replaces_what_it_reads(base: Path, tmp_path: Path, keys: dict[str, Any]):
    own = tmp_path / "project" / "model"
    shutil.copytree(base, own)
    for folder in (own, own.parent):
        with pytest.raises(ConfigError, match=r"export_dir: .* holds .*, which is exported\. Choose another folder"):
            export(run_of(own, folder, **keys))
    assert (own / "config.json").exists()


def test_export_onto_a_file_or_without_a_folder_is_refused(base: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"export_dir: .*file is a file"):
        export(run_of(base, tmp_path / "file"))
    with pytest.raises(ConfigError, match="export_dir: "):
        export(load({"model_name_or_path": str(base)}))


def test_export_onto_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(CheckpointError, match=r"export_dir: the model has .* KiB, but .* has only 0\.10 KiB free"):
        export(run_of(base, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_export_into_a_folder_that_cannot_be_written_is_one_clear_line(base: Path, tmp_path: Path):
    if os.geteuid() == 0:
        parent = Path("/proc/export")  # not even root may write there
    else:
        parent = tmp_path / "locked"
        parent.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=r"cannot be written .* Choose another export_dir"):
        export(run_of(base, parent / "out"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # the point of this test
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_export_keeps_a_head_that_was_trained_apart_from_a_tied_embedding(tmp_path: Path):
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head", "embed_tokens"])
    result = export(run_of(base, tmp_path / "out", adapter_name_or_path=str(adapter)))
    assert result.comparison.largest < 1e-4
    assert json.loads((result.folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_export_of_a_model_without_chat_template_has_none(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    result = export(run_of(base, tmp_path / "out", template="auto"))
    assert AutoTokenizer.from_pretrained(result.folder).chat_template is None
    assert GenerationConfig.from_pretrained(result.folder).eos_token_id == tokenizer.eos_token_id


def test_export_mends_a_generation_config_that_could_not_be_saved(tmp_path: Path):
    base = save_tiny_model(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 2}))
    result = export(run_of(base, tmp_path / "out"))
    generation = GenerationConfig.from_pretrained(result.folder)
    assert (generation.do_sample, generation.temperature) == (True, 0.6)


def test_compare_by_hand():
    expected = torch.tensor([[1.0, 2.0, -8.0], [3.0, 0.0, 0.0]])
    found = torch.tensor([[1.5, 2.0, -8.0, 9.0], [3.0, 4.0, 0.0, 9.0]])
    result = compare(expected, found)
    assert (result.largest, result.scale, result.agreeing, result.positions) == (4.0, 8.0, 1, 2)
    assert str(result) == ("largest logit difference 4 (of logits up to 8), same most likely token at 1 of 2 positions")
