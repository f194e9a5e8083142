"""A finished model in a folder that Transformers, vLLM and others load as it is: adapters merged, nothing quantised.

The result is read back before it gets its name, and its logits are compared with those of the model that was to be
exported; so a folder with its final name is complete and does what the tuned model did.
"""

from __future__ import annotations

import gc
import math
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base.errors import CheckpointError, ConfigError, ModelError, first_line
from fourfold.base.log import get_logger
from fourfold.base.peft import PeftModel
from fourfold.base.units import format_bytes, format_count
from fourfold.checkpoint.compare import Comparison, compare, fixed_prompts, logits_of
from fourfold.checkpoint.folder import write_folder
from fourfold.config.model import ModelConfig
from fourfold.config.schema import Run
from fourfold.dataset.template import AUTO
from fourfold.models.adapters import attach
from fourfold.models.inference import inference_device, load_for_inference, written_dtype
from fourfold.models.load import load_config, read_written
from fourfold.models.patches import bars_on_terminals_only, peft_noise_ignored
from fourfold.models.quantize import dequantize_model, is_quantized
from fourfold.models.renderer import make_renderer
from fourfold.models.tokenizer import load_tokenizer
from fourfold.models.value_head import find_value_head, missing_head
from fourfold.models.weights import save_model

log = get_logger(__name__)

_WHEN_FULL = "Free some space, or choose another export_dir, and export again."
_SUSPICIOUS = 0.1
"""Share of the largest logit beyond which a difference is more than rounding to bf16."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` wrote.

    Attributes:
        folder: where.
        num_parameters: of the model.
        dtype: of its weights.
        comparison: the written model, read back, against the model that was to be exported.
    """

    folder: Path
    num_parameters: int
    dtype: torch.dtype
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class _Source:
    """The model that is to be exported.

    Attributes:
        model: merged and not quantised.
        compute: the dtype that its logits were computed in.
        prompts: token ids, for the comparison.
        logits: those of the model before the merge, [P, V].
    """

    model: PreTrainedModel
    compute: torch.dtype
    prompts: list[list[int]]
    logits: Tensor


def export(run: Run) -> Exported:
    """Merge the adapters of a config into its model and write the result to `export_dir`.

    Raises:
        ConfigError: no `export_dir`, or one that holds something else.
        ModelError: a model or adapter that cannot be loaded, or an adapter of another base model; no value head where
            the stage is rm.
        CheckpointError: the disk is full, or what was written is not what should be; nothing is left behind.
    """
    folder = target_folder(run)
    device = inference_device(run) if run.export.export_device == "auto" else torch.device("cpu")
    value_head = _find_value_head(run)
    tokenizer = load_tokenizer(run.model)
    stop_token_ids = settle_tokenizer(run, tokenizer)
    dtype = written_dtype(run.model)
    source = _load(run, tokenizer, device, dtype)
    settle_generation(source.model, tokenizer, stop_token_ids)
    num_parameters = source.model.num_parameters()
    _check_space(folder, num_parameters * dtype.itemsize)
    compared: list[Comparison] = []

    def write(temporary: Path) -> None:
        size = f"{run.export.export_size}GB"
        if source.model.dtype != dtype:  # else what Transformers keeps in fp32 stays so
            torch.nn.Module.to(source.model, dtype)
        save_model(source.model, temporary, tokenizer=tokenizer, max_shard_size=size)
        if value_head is not None:
            shutil.copyfile(value_head, temporary / value_head.name)
        torch.nn.Module.to(source.model, "meta")  # its memory is needed for the copy that is read back
        compared.append(_read_back(run, temporary, source, device))

    write_folder(folder, write, manifest=False, key="export_dir", when_full=_WHEN_FULL)
    exported = Exported(folder, num_parameters, dtype, compared[0])
    _report(exported)
    if run.export.export_hub_model_id:
        _upload(folder, run.export.export_hub_model_id, run.model.hf_hub_token)
    return exported


def target_folder(run: Run) -> Path:
    """The folder to write to: new, empty, or one that may be replaced.

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    if not run.export.export_dir:
        raise ConfigError("export_dir: no folder is given. Name the folder to write the model to.")
    folder = Path(run.export.export_dir).expanduser()
    for source in (run.model.model_name_or_path, *run.model.adapter_name_or_path):
        path = Path(source or "").expanduser()
        if source and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"export_dir: {folder} holds {source}, which is exported. Choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"export_dir: {folder} is a file. Choose another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not run.output.overwrite_output_dir:
        raise ConfigError(
            f"export_dir: {folder} is not empty. Choose another folder, or replace it with overwrite_output_dir: true."
        )
    return folder


def _find_value_head(run: Run) -> Path | None:
    """The file that makes a reward model of it, which goes along; None for other models."""
    path = find_value_head(run.model)
    if path is None and run.training.stage == "rm":
        raise ModelError(missing_head(run.model))
    if path is not None:
        log.info("The value head goes along: %s", path)
    return path


def settle_tokenizer(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the tokenizer what inference needs: the chat template and padding on the left. Changes `tokenizer`.

    Returns:
        the tokens that end an answer.
    Raises:
        ConfigError: no such template or tool format.
    """
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only what is in the latter is saved
    if run.data.template == AUTO and tokenizer.chat_template is None:
        log.info("template: the tokenizer has no chat template and none is named, so the exported model has none.")
        return [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    renderer = make_renderer(run.data, tokenizer)
    tokenizer.chat_template = renderer.chat_template
    return list(renderer.stop_token_ids)


def _load(run: Run, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype) -> _Source:
    """The model to be written, merged, and what it computed before."""
    compute = torch.float32 if dtype is torch.float16 and device.type == "cpu" else dtype
    tuned = load_for_inference(run, tokenizer, device, compute)
    prompts = fixed_prompts(tokenizer)
    logits = logits_of(tuned, prompts, device)
    base = tuned.get_base_model() if isinstance(tuned, PeftModel) else tuned
    assert isinstance(base, PreTrainedModel)
    if is_quantized(base):
        # PEFT would quantise the merged weights again, so the adapter is attached anew to plain ones
        log.info("The quantised weights are expanded to %s before the merge.", _short(compute))
        plain = tuned.unload() if isinstance(tuned, PeftModel) else tuned
        assert isinstance(plain, PreTrainedModel)
        vars(plain).pop("peft_config", None)  # PEFT 0.18 leaves it there, and would see two adapters
        tuned = attach(dequantize_model(plain, compute), run.model, run.tuning, trainable=False)
    return _Source(merge(tuned), compute, prompts, logits)


def merge(tuned: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with its adapter merged into the weights, in place.

    Raises:
        ModelError: the merged weights are not finite.
    """
    if isinstance(tuned, PreTrainedModel):
        return tuned
    tied = bool(tuned.config.tie_word_embeddings)
    try:
        with peft_noise_ignored(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            model = tuned.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"adapter_name_or_path: the adapter cannot be merged ({error}). Train it anew.") from error
    assert isinstance(model, PreTrainedModel)
    if tied and _head_differs(model):
        # else one of the two would be lost when the model is saved
        model.config.tie_word_embeddings = False
        log.info("The adapter has a head of its own, so the exported model's is no longer tied to the embedding.")
    return model


def _head_differs(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return False
    ours, theirs = head.weight, embedding.weight
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    return ours is not theirs and not torch.equal(ours, theirs)


def settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]) -> None:
    """Let the saved config say how to generate: with the template's stop tokens and a cache. Changes `model`."""
    model.config.use_cache = True
    own = model.generation_config if model.generation_config is not None else GenerationConfig()
    # made anew, so that Transformers does not take it for one that follows the model's config
    config = GenerationConfig(**{key: value for key, value in own.to_diff_dict().items() if not key.startswith("_")})
    if stop_token_ids:
        config.eos_token_id = stop_token_ids[0] if len(stop_token_ids) == 1 else stop_token_ids
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.use_cache = True
    if not config.do_sample and any(
        value not in (None, neutral) for value, neutral in ((config.temperature, 1.0), (config.top_p, 1.0))
    ):
        # such a config is not valid, and what its author meant is plain
        config.do_sample = True
        log.info("The generation config has a temperature or top_p, so it says do_sample: true now.")
    model.generation_config = config


def _check_space(folder: Path, num_bytes: int) -> None:
    existing = next(path for path in folder.absolute().parents if path.exists())
    disk = shutil.disk_usage(existing)
    if disk.total and disk.free < num_bytes:  # a file system without a size does not say what it holds
        raise CheckpointError(
            f"export_dir: the model has {format_bytes(num_bytes)}, but {existing} has only {format_bytes(disk.free)} "
            f"free. {_WHEN_FULL}"
        )


def _read_back(run: Run, folder: Path, source: _Source, device: torch.device) -> Comparison:
    """Load what was written and compare it."""
    gc.collect()
    try:
        with bars_on_terminals_only():
            written = ModelConfig(model_name_or_path=str(folder), trust_remote_code=run.model.trust_remote_code)
            options = {"dtype": source.compute, "trust_remote_code": run.model.trust_remote_code}
            model = read_written(str(folder), load_config(written), **options).eval()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"export_dir: the written model cannot be read back ({error}). Export again.") from error
    torch.nn.Module.to(model, device)
    comparison = compare(source.logits, logits_of(model, source.prompts, device))
    if not math.isfinite(comparison.largest):
        raise CheckpointError(
            "export_dir: the written model computes numbers that are not finite. Use infer_dtype: bfloat16 or float32."
        )
    return comparison


def _report(exported: Exported) -> None:
    comparison = exported.comparison
    log.info(
        "Exported %s parameters in %s to %s",
        format_count(exported.num_parameters),
        _short(exported.dtype),
        exported.folder,
    )
    log.info("Read back, and compared with the model before the merge: %s.", comparison)
    if comparison.largest > _SUSPICIOUS * comparison.scale:
        log.warning("export_dir: this is more than rounding. Look at the exported model's answers before you use it.")


def _upload(folder: Path, repository: str, token: str | None) -> None:
    api = HfApi(token=token)
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"export_hub_model_id: {repository} cannot be uploaded ({reason}). The model is in {folder}; "
            "check hf_hub_token and the network."
        ) from error
    log.info("Uploaded to %s", repository)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
