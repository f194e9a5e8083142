"""What is trained: everything, a few layers, or low-rank adapters through PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fourfold.base.errors import ConfigError, ModelError
from fourfold.base.log import get_logger
from fourfold.base.peft import BaseTunerLayer, LoraConfig, LoraLayer, PeftModel, TaskType, get_peft_model
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.families.composite import RENAMED
from fourfold.models import pissa
from fourfold.models.composite import settle_adapter, whole_of
from fourfold.models.freeze import freeze_choices, unfreeze
from fourfold.models.identity import BaseIdentity, check_adapter, identify
from fourfold.models.parameters import is_empty, list_parameters, upcast_norms, upcast_trainable
from fourfold.models.patches import adapters_have_weights, peft_noise_ignored
from fourfold.models.quantize import is_quantized
from fourfold.models.source import check_source, explained
from fourfold.models.targets import ALL, LoraTargets, lora_targets
from fourfold.models.value_head import freeze_head
from fourfold.models.vocabulary import grows_vocabulary

log = get_logger(__name__)

_KEY = "adapter_name_or_path"


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What becomes of the adapters that a config names.

    Attributes:
        merged: those merged into the base, in order.
        continued: the one that is trained further, or used as it is; None for a new one or none at all.
    """

    merged: tuple[str, ...] = ()
    continued: str | None = None


def plan_adapters(config: ModelConfig, tuning: TuningConfig, *, trainable: bool) -> AdapterPlan:
    """All but the last are merged; the last too if a new one is to be trained on top.

    Raises:
        ConfigError: adapters with another `finetuning_type`.
    """
    names = config.adapter_name_or_path
    if names and tuning.finetuning_type != "lora":
        raise ConfigError(
            f"{_KEY}: adapters need finetuning_type: lora, which is {tuning.finetuning_type}. Change one of the two."
        )
    if not names or (trainable and tuning.create_new_adapter):
        return AdapterPlan(names)
    return AdapterPlan(names[:-1], names[-1])


def identify_base(config: ModelConfig, tuning: TuningConfig) -> BaseIdentity | None:
    """The identity to be saved with the adapter that this run trains; see `save_model`."""
    return identify(config, plan_adapters(config, tuning, trainable=True).merged)


@contextmanager
def without_adapters(module: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within it a model computes as if it had no adapters; one without any as it is.

    PEFT's own way would also take their gradients' flags away, which what shards a model has read by then.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def attach(
    model: PreTrainedModel,
    config: ModelConfig,
    tuning: TuningConfig,
    *,
    trainable: bool,
    master_dtype: torch.dtype | None = torch.float32,
    reads_logits: bool = True,
) -> PreTrainedModel | PeftModel:
    """Set what is trained, and add or load the adapters.

    Args:
        model: as `load_model` gives it; changed in place.
        trainable: False for chat, prediction and export: adapters are loaded and nothing requires a gradient.
        master_dtype: of the trained parameters; None leaves them as they are (`pure_bf16`).
        reads_logits: whether the loss depends on the logits; otherwise the head is not trained.
    Raises:
        ConfigError: a target that matches nothing, or settings that contradict each other or the model.
        ModelError: an adapter that cannot be loaded or belongs to another base model.
    """
    plan = plan_adapters(config, tuning, trainable=trainable)
    model.requires_grad_(False)
    if config.upcast_layernorm:
        upcast_norms(model)
    tuned: PreTrainedModel | PeftModel = _load_adapters(model, config, tuning, plan, trainable=trainable)
    if not trainable:
        tuned.requires_grad_(False)
        return tuned.eval()
    log.info("Fine-tuning method: %s", {"lora": "LoRA", "freeze": "Freeze", "full": "Full"}[tuning.finetuning_type])
    if tuning.finetuning_type == "lora":
        if plan.continued is None:
            assert isinstance(tuned, PreTrainedModel)
            tuned = _new_adapter(tuned, config, tuning, reads_logits=reads_logits)
    elif is_quantized(model):
        raise ConfigError(
            f"finetuning_type: {tuning.finetuning_type} cannot train quantised weights. Use lora, or a plain "
            "checkpoint without quantization_bit."
        )
    elif tuning.finetuning_type == "freeze":
        unfreeze(model, tuning)
    else:
        model.requires_grad_(True)
    freeze_choices(tuned)
    if not reads_logits:
        freeze_head(tuned, _key_of_head(tuning, plan))
    if master_dtype is not None:
        upcast_trainable(tuned, master_dtype)
    if config.print_param_status:
        log.info(list_parameters(tuned))
    return tuned


def _key_of_head(tuning: TuningConfig, plan: AdapterPlan) -> str | None:
    """The key that has a head trained which is not trained by itself; None under full tuning."""
    if tuning.finetuning_type == "full":
        return None
    if tuning.finetuning_type == "freeze":
        return "freeze_extra_modules"
    if plan.continued is not None:
        return f"{_KEY}: {plan.continued}"
    return "additional_target" if tuning.additional_target else "lora_target"


def _load_adapters(
    model: PreTrainedModel, config: ModelConfig, tuning: TuningConfig, plan: AdapterPlan, *, trainable: bool
) -> PreTrainedModel | PeftModel:
    """Merge and load what the plan says, after checking that each belongs to this base."""
    if not plan.merged and plan.continued is None:
        return model
    if plan.merged and is_quantized(model):
        raise ConfigError(
            f"{_KEY}: {', '.join(plan.merged)} cannot be merged into a quantised base without loss. Give a single "
            "adapter without create_new_adapter, or merge them first with `fourfold export`."
        )
    base = identify(config)
    for index, name in enumerate(plan.merged):
        loaded = _load_adapter(model, config, name, base, plan.merged[:index], trainable=False)
        merged = loaded.merge_and_unload()
        assert isinstance(merged, PreTrainedModel)
        model = merged
        log.info("Merged adapter %s into the base model.", name)
    model.requires_grad_(False)
    if plan.continued is None:
        return model
    loaded = _load_adapter(model, config, plan.continued, base, plan.merged, trainable=trainable)
    log.info("Loaded adapter %s.", plan.continued)
    if trainable:
        _tell_ignored(loaded, plan.continued, tuning)
    return loaded


def _tell_ignored(loaded: PeftModel, name: str, tuning: TuningConfig) -> None:
    """Warn of keys that ask for another adapter than the one that is trained further."""
    kept = loaded.peft_config["default"]
    if not isinstance(kept, LoraConfig):
        return
    has = {
        "lora_rank": kept.r,
        "lora_dropout": kept.lora_dropout,
        "use_rslora": kept.use_rslora,
        "use_dora": kept.use_dora,
    }
    for key, value in has.items():
        asked = getattr(tuning, key)
        if key in tuning.model_fields_set and asked != value:
            log.warning(
                "%s: %s has no effect, since adapter %s is trained further, which has %s. Remove it, or begin a new "
                "adapter on top with create_new_adapter: true.",
                key,
                asked,
                name,
                value,
            )


def _load_adapter(
    model: PreTrainedModel,
    config: ModelConfig,
    name: str,
    base: BaseIdentity | None,
    merged: tuple[str, ...],
    *,
    trainable: bool,
) -> PeftModel:
    check_source(name, key=_KEY)
    check_adapter(name, config, base, merged)
    options: dict[str, Any] = {"subfolder": config.adapter_folder} if config.adapter_folder else {}
    if whole_of(model) is not None:
        options |= {"key_mapping": dict(RENAMED), "config": settle_adapter(name, config.adapter_folder, config)}
    if not Path(name).exists():
        options |= {"token": config.hf_hub_token, "cache_dir": config.cache_dir}
    try:
        with peft_noise_ignored(), _with_weights(model), explained(name, "the adapter", key=_KEY):
            return PeftModel.from_pretrained(
                model, name, is_trainable=trainable, autocast_adapter_dtype=False, **options
            )
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ModelError(
            f"{_KEY}: the weights of {name} have other shapes than {config.model_name_or_path} needs. "
            "Use the base model that it was trained on."
        ) from error


def _new_adapter(model: PreTrainedModel, config: ModelConfig, tuning: TuningConfig, *, reads_logits: bool) -> PeftModel:
    targets = lora_targets(model, tuning.lora_target)
    if ALL in tuning.lora_target:
        targets = _without_experts(targets, tuning)
        log.info("Found linear modules: %s", ",".join(targets.modules))
    if targets.parameters:
        log.info(
            "Expert weights get adapters too: %s. To leave them out, name the other kinds in lora_target.",
            ",".join(targets.parameters),
        )
    if tuning.pissa_init:
        _check_pissa(model, tuning, targets)
    extra = _additional_modules(model, config, tuning, reads_logits=reads_logits)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha or 2 * tuning.lora_rank,
        lora_dropout=tuning.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora,
        modules_to_save=extra or None,
        ensure_weight_tying=bool(extra) and bool(model.config.tie_word_embeddings),
        init_lora_weights=pissa.init_name(tuning.pissa_iter) if tuning.pissa_init else True,  # type: ignore[arg-type]
    )
    with peft_noise_ignored(), _with_weights(model):
        try:
            peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ConfigError(f"lora_target: this model cannot be adapted as asked ({error}).") from error
    assert isinstance(peft_model, PeftModel)
    _report_unadapted(peft_model, targets)
    if tuning.pissa_init:
        pissa.keep_start(peft_model)
        log.info("PiSSA: the adapter is saved as a plain LoRA adapter of rank %d, for the unchanged base model.",
                 2 * tuning.lora_rank)  # fmt: skip
    return peft_model


def _with_weights(model: PreTrainedModel) -> AbstractContextManager[None]:
    return adapters_have_weights() if is_empty(model) else nullcontext()


def _without_experts(targets: LoraTargets, tuning: TuningConfig) -> LoraTargets:
    """Leave stacked expert weights out where an option does not go with them."""
    reasons = {
        "lora_dropout": tuning.lora_dropout > 0,
        "use_dora": tuning.use_dora,
        "pissa_init": tuning.pissa_init,
    }
    against = [key for key, given in reasons.items() if given]
    if not targets.parameters or not against:
        return targets
    log.warning(
        "lora_target: the expert weights %s get no adapter, since that does not go with %s. Drop it to adapt them.",
        ", ".join(targets.parameters),
        " and ".join(against),
    )
    return LoraTargets(targets.modules)


def _check_pissa(model: PreTrainedModel, tuning: TuningConfig, targets: LoraTargets) -> None:
    if is_quantized(model):
        raise ConfigError(
            "pissa_init: the principal components of quantised weights cannot be taken out. Leave out pissa_init or "
            "quantization_bit."
        )
    if tuning.use_dora:
        raise ConfigError("pissa_init: does not go with use_dora, which rescales the base weights. Set one of the two.")
    if targets.parameters:
        raise ConfigError(
            f"pissa_init: does not go with the expert weights {', '.join(targets.parameters)}. "
            "Take them out of lora_target."
        )


def _additional_modules(
    model: PreTrainedModel, config: ModelConfig, tuning: TuningConfig, *, reads_logits: bool
) -> list[str]:
    """Modules trained in full beside the adapters; a resized embedding and head always are.

    Raises:
        ConfigError: a name that matches nothing.
    """
    wanted = list(tuning.additional_target)
    names = [name for name, _ in model.named_modules() if name]
    missing = [want for want in wanted if not any(f".{name}".endswith("." + want) for name in names)]
    if missing:
        valid = sorted({name.split(".")[-1] for name in names if not name.split(".")[-1].isdigit()})
        raise ConfigError(
            f"additional_target: {', '.join(missing)} matches nothing in this {model.config.model_type} model. "
            f"Use one or more of: {', '.join(valid)}."
        )
    if grows_vocabulary(config) and not wanted:
        alone = model.config.tie_word_embeddings or not reads_logits
        ends = (model.get_input_embeddings(), None if alone else model.get_output_embeddings())
        wanted = [name.split(".")[-1] for name, module in model.named_modules() if any(module is end for end in ends)]
        log.info("resize_vocab: %s are trained and saved with the adapter.", " and ".join(wanted))
    return wanted


def _report_unadapted(model: PeftModel, targets: LoraTargets) -> None:
    """Say which layers were meant to get an adapter and did not."""
    inner = model.get_base_model()
    left = [
        name
        for name, module in inner.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(f".{name}".endswith("." + kind) for kind in targets.modules)
        and not isinstance(module, LoraLayer)
        and "lora_" not in name
    ]
    if left:
        log.warning(
            "lora_target: %d layers get no adapter, e.g. %s: PEFT takes their names for the fused experts' of this "
            "model family.",
            len(left),
            left[0],
        )
