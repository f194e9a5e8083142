"""Keys that only LLaMA-Factory has, mapped or of a later version; the refused ones are in refused.py."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.compat.translation import settled, switch
from fourfold.config.key import Section, later

_OTHER_HUB = "models and data sets come from Hugging Face's hub, ModelScope's or a folder"
_BENCHMARK = "Fourfold runs no benchmarks; export the model and give it to lm-eval"
_PROFILER = "profiling"
_TOKEN_LOSS = "the token-weighted losses of stage sft"


class LlamaFactoryKeys(Section):
    """Keys of LLaMA-Factory that Fourfold knows by another name, or that leave nothing to choose."""

    title: ClassVar[str] = "LLaMA-Factory"

    low_cpu_mem_usage: bool = settled(
        True, "Load weights without a second copy.", "weights are always streamed to their device"
    )
    shift_attn: bool = settled(
        False, "Shifted sparse attention of LongLoRA.", "full attention is used, which that method approximates"
    )
    use_unsloth: bool = settled(False, "Use Unsloth.", "Fourfold's own engine trains the model")
    use_unsloth_gc: bool = switch("Unsloth's gradient checkpointing.", gradient_checkpointing=True)
    use_v1_kernels: bool = switch("High-performance kernels.", enable_liger_kernel=True)
    use_reentrant_gc: bool = settled(
        True, "Re-entrant gradient checkpointing.", "checkpointing is never re-entrant; its results are the same"
    )
    upcast_lmhead_output: bool = settled(
        False, "Compute the logits in fp32.", "the loss is always computed from fp32 logits"
    )
    quantization_device_map: Literal["auto"] | None = settled(
        None, "Where quantised weights are put.", "the layout decides, see strategy"
    )
    om_hub_token: str | None = settled(None, "Token for Openmind.", _OTHER_HUB, secret=True)
    export_legacy_format: bool = settled(False, "Write .bin files.", "only safetensors files are written")

    use_muon: bool = switch("Use the Muon optimizer.", optim="muon")
    use_adam_mini: bool = switch("Use Adam-mini, which needs less memory than AdamW.", optim="adamw_8bit")

    use_asft_loss: bool = later(False, "Anchored SFT loss.", _TOKEN_LOSS, blocks=True)
    asft_alpha: float = later(0.1, "Weight of ASFT's anchor.", _TOKEN_LOSS)
    use_eaft_loss: bool = later(False, "Entropy-adaptive loss.", _TOKEN_LOSS, blocks=True)
    eaft_alpha: float = later(1.0, "Exponent of EAFT's weight.", _TOKEN_LOSS)

    fp8_backend: str = settled("auto", "Library for float8 products.", "PyTorch's own kernels are used")
    fp8_enable_fsdp_float8_all_gather: bool = later(False, "Gather FSDP weights in float8.", "gathering in float8")
    master_addr: str | None = settled(None, "Address of the first node.", "give it in the environment, as MASTER_ADDR")
    master_port: str | None = settled(None, "Port of the first node.", "give it in the environment, as MASTER_PORT")

    enable_torch_profiler: bool = later(False, "Record a profile with torch.profiler.", _PROFILER)
    profiler_output_dir: str | None = later(None, "Folder for profiles.", _PROFILER)
    profiler_wait_steps: int = later(1, "Steps before a profile.", _PROFILER)
    profiler_warmup_steps: int = later(1, "Steps of warm-up of a profile.", _PROFILER)
    profiler_active_steps: int = later(1, "Steps that are recorded.", _PROFILER)
    profiler_repeat: int = later(1, "How many profiles are made.", _PROFILER)
    profiler_record_shapes: bool = later(True, "Record the shapes of operands.", _PROFILER)
    profiler_profile_memory: bool = later(True, "Record memory.", _PROFILER)
    profiler_with_stack: bool = later(True, "Record the stack of each operation.", _PROFILER)
    profile_modules: bool = later(False, "Record modules by name.", _PROFILER)

    task: str | None = settled(None, "Benchmark to run.", _BENCHMARK)
    task_dir: str = settled("evaluation", "Folder of benchmarks.", _BENCHMARK)
    batch_size: int = settled(4, "Batch size of a benchmark.", _BENCHMARK)
    lang: Literal["en", "zh"] = settled("en", "Language of a benchmark.", _BENCHMARK)
    n_shot: int = settled(5, "Examples in a benchmark's prompt.", _BENCHMARK)
    save_dir: str | None = settled(None, "Folder for a benchmark's results.", _BENCHMARK)
    download_mode: str = settled("reuse_dataset_if_exists", "How a benchmark is fetched.", _BENCHMARK)
