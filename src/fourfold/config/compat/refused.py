"""Keys that are out of scope, with the reason and what to use instead."""

from __future__ import annotations

from typing import Any, ClassVar

from fourfold.config.compat.translation import refused
from fourfold.config.key import Options, Section

_MULTIMODAL = "Only text is trained. Remove it."
_KT = "KTransformers is not supported. Use quantization_bit: 4, or more devices (strategy)."
_RAY = "Ray is not used. Start the job with `fourfold train` or torchrun."
_MEGATRON = (
    "Megatron is not used; the layouts are Fourfold's own. Remove it and use strategy, or the mapping parallel; "
    "tensor_model_parallel_size and its like are understood."
)
_HYPER = "HyperParallel is not used. Use strategy, or the mapping parallel."
_GALORE = "GaLore is not supported. Use optim: adamw_8bit, or finetuning_type: lora, to save memory."
_APOLLO = "APOLLO is not supported. Use optim: adamw_8bit, or finetuning_type: lora, to save memory."
_BADAM = "BAdam is not supported. Use finetuning_type: freeze, or lora, to save memory."
_OFT = "OFT adapters are not supported. Use finetuning_type: lora."
_PRO = "Block expansion (LLaMA-Pro) is not supported. Use finetuning_type: freeze with freeze_trainable_layers."
_MOD = "Mixture of depths is not supported. Remove it."
_GPTQ = "GPTQ export is not supported. Export the merged model, then quantise it with a tool of its own."
_SGLANG = "SGLang is not supported. Use infer_backend: huggingface."

Text = str | None


class RefusedKeys(Section):
    """Keys of methods and engines that Fourfold does not have. Their defaults are accepted, since they ask nothing."""

    title: ClassVar[str] = "Refused"

    image_max_pixels: int = refused(768 * 768, _MULTIMODAL)
    image_min_pixels: int = refused(32 * 32, _MULTIMODAL)
    image_do_pan_and_scan: bool = refused(False, _MULTIMODAL)
    crop_to_patches: bool = refused(False, _MULTIMODAL)
    video_max_pixels: int = refused(256 * 256, _MULTIMODAL)
    video_min_pixels: int = refused(16 * 16, _MULTIMODAL)
    video_fps: float = refused(2.0, _MULTIMODAL)
    video_maxlen: int = refused(128, _MULTIMODAL)
    use_audio_in_video: bool = refused(False, _MULTIMODAL)
    audio_sampling_rate: int = refused(16000, _MULTIMODAL)
    freeze_vision_tower: bool = refused(True, _MULTIMODAL)
    freeze_multi_modal_projector: bool = refused(True, _MULTIMODAL)
    freeze_language_model: bool = refused(False, _MULTIMODAL)
    media_dir: Text = refused(None, _MULTIMODAL)

    use_kt: bool = refused(False, _KT)
    kt_cpu_activation: bool = refused(False, _KT)
    kt_weight_path: Text = refused(None, _KT)
    kt_non_expert_weight_path: Text = refused(None, _KT)
    kt_expert_checkpoint_path: Text = refused(None, _KT)
    kt_use_lora_experts: bool = refused(False, _KT)
    kt_lora_expert_num: int | None = refused(None, _KT)
    kt_lora_expert_intermediate_size: int | None = refused(None, _KT)
    kt_config: Any = refused(None, _KT)

    ray_num_workers: int = refused(1, _RAY)
    ray_init_kwargs: Options | None = refused(None, _RAY)
    ray_scope: str = refused("last", _RAY)

    use_mca: bool = refused(False, _MEGATRON)
    use_megatron_bridge: bool = refused(False, _MEGATRON)
    megatron_pretrained_checkpoint: Text = refused(None, _MEGATRON)
    extra_config: Any = refused(None, _MEGATRON)
    use_hyper_parallel: bool = refused(False, _HYPER)
    hyper_parallel_args: Any = refused(None, _HYPER)
    hyper_parallel_cp_size: int = refused(1, _HYPER)

    use_galore: bool = refused(False, _GALORE)
    galore_target: str = refused("all", _GALORE)
    galore_rank: int = refused(16, _GALORE)
    galore_update_interval: int = refused(200, _GALORE)
    galore_scale: float = refused(2.0, _GALORE)
    galore_proj_type: str = refused("std", _GALORE)
    galore_layerwise: bool = refused(False, _GALORE)
    use_apollo: bool = refused(False, _APOLLO)
    apollo_target: str = refused("all", _APOLLO)
    apollo_rank: int = refused(16, _APOLLO)
    apollo_update_interval: int = refused(200, _APOLLO)
    apollo_scale: float = refused(32.0, _APOLLO)
    apollo_proj: str = refused("random", _APOLLO)
    apollo_proj_type: str = refused("std", _APOLLO)
    apollo_scale_type: str = refused("channel", _APOLLO)
    apollo_layerwise: bool = refused(False, _APOLLO)
    apollo_scale_front: bool = refused(False, _APOLLO)
    optim_target_modules: Any = refused(None, _GALORE)
    use_badam: bool = refused(False, _BADAM)
    badam_mode: str = refused("layer", _BADAM)
    badam_start_block: int | None = refused(None, _BADAM)
    badam_switch_mode: str | None = refused("ascending", _BADAM)
    badam_switch_interval: int | None = refused(50, _BADAM)
    badam_update_ratio: float = refused(0.05, _BADAM)
    badam_mask_mode: str = refused("adjacent", _BADAM)
    badam_verbose: int = refused(0, _BADAM)

    oft_rank: int = refused(0, _OFT)
    oft_block_size: int = refused(32, _OFT)
    oft_target: str = refused("all", _OFT)
    module_dropout: float = refused(0.0, _OFT)
    use_llama_pro: bool = refused(False, _PRO)
    mixture_of_depths: Text = refused(None, _MOD)

    export_quantization_bit: int | None = refused(None, _GPTQ)
    export_quantization_dataset: Text = refused(None, _GPTQ)
    export_quantization_nsamples: int = refused(128, _GPTQ)
    export_quantization_maxlen: int = refused(1024, _GPTQ)

    sglang_maxlen: int = refused(4096, _SGLANG)
    sglang_mem_fraction: float = refused(0.7, _SGLANG)
    sglang_tp_size: int = refused(-1, _SGLANG)
    sglang_config: Any = refused(None, _SGLANG)
    sglang_lora_backend: str = refused("triton", _SGLANG)
