"""Keys of the model: where it comes from, how it is loaded and quantised."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.key import CommaList, Folder, LocalPath, PathList, Section, Status, key, later

_BNB_ONLY = "Weights are quantised by bitsandbytes at load time. Use quantization_method: bnb, or load a checkpoint "
_GPTQ = _BNB_ONLY + "that is not quantised."


class ModelConfig(Section):
    """The base model, its tokenizer, adapters to start from, and quantisation."""

    title: ClassVar[str] = "Model"

    model_name_or_path: LocalPath | None = key(None, "Hub id, local folder, or .gguf file of the base model.")
    adapter_name_or_path: PathList = key((), "Adapter folders or hub ids to start from, comma-separated.")
    adapter_folder: str | None = key(None, "Folder within adapter_name_or_path that holds the adapter.")
    cache_dir: LocalPath | None = key(None, "Where models and data sets from a hub are stored.")
    model_revision: str = key("main", "Branch, tag or commit of the model on its hub.")
    hf_hub_token: str | None = key(None, "Token for the Hugging Face hub.", secret=True)
    ms_hub_token: str | None = key(None, "Token for ModelScope's hub (USE_MODELSCOPE_HUB=1).", secret=True)
    trust_remote_code: bool = key(False, "Run Python code that comes with the model. Only for authors that you trust.")
    train_from_scratch: bool = key(False, "Initialise the weights at random instead of loading them.")
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = key(
        None, "Stretch rotary positions so that cutoff_len may exceed the model's own context."
    )
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = key(
        "auto", "Attention kernel; auto takes the fastest that the device and the model allow."
    )
    moe_aux_loss_coef: float | None = key(
        None, "Weight of the router's load-balancing loss of a mixture-of-experts model.", ge=0
    )
    enable_liger_kernel: bool = key(False, "Use the kernels of liger-kernel (extra: kernels).")
    upcast_layernorm: bool = key(False, "Keep the norm layers' weights in fp32.")
    print_param_status: bool = key(False, "Print name, dtype, device and trainability of every parameter.")
    offload_folder: str | None = key(
        None,
        "Folder for weights that do not fit into memory.",
        status=Status.MAPPED,
        note="weights are streamed straight to their device, no folder is used",
    )

    use_fast_tokenizer: bool = key(True, "Use the fast (Rust) tokenizer.", group="Tokenizer")
    resize_vocab: bool = key(False, "Grow the embedding to the tokenizer's size.", group="Tokenizer")
    split_special_tokens: bool = key(False, "Tokenise special tokens that occur in text as text.", group="Tokenizer")
    add_tokens: CommaList = key((), "Tokens to add, comma-separated.", group="Tokenizer")
    add_special_tokens: CommaList = key((), "Special tokens to add, comma-separated.", group="Tokenizer")
    new_special_tokens_config: LocalPath | None = key(
        None, "YAML file that maps new special tokens to descriptions of them.", group="Tokenizer"
    )
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = key(
        "noise_init",
        "How embeddings of new special tokens start: the mean with noise, or the mean of their description's.",
        group="Tokenizer",
    )

    quantization_bit: Literal[4, 8] | None = key(
        None, "Quantise the frozen base to 4 or 8 bits (QLoRA).", group="Quantisation"
    )
    quantization_method: Literal["bnb"] = key(
        "bnb",
        "Library that quantises.",
        group="Quantisation",
        renamed={
            "bitsandbytes": "bnb",
            "BNB": "bnb",
            "quanto": "bnb",
            "mxfp4": "bnb",
            "fp8": "bnb",
        },
        refused=dict.fromkeys(("gptq", "awq", "aqlm", "hqq", "eetq"), _GPTQ),
    )
    quantization_type: Literal["nf4", "fp4"] = key("nf4", "Data type of 4-bit weights.", group="Quantisation")
    double_quantization: bool = key(
        True, "Quantise the quantisation constants of 4-bit weights too.", group="Quantisation"
    )

    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = key(
        "auto", "Data type for chat, export and prediction; auto takes the checkpoint's own.", group="Inference"
    )
    infer_backend: str = key(
        "huggingface",
        "Engine that generates text.",
        group="Inference",
        folder=Folder("fourfold.generate"),
        renamed={"hf": "huggingface", "transformers": "huggingface"},
        refused={"sglang": "SGLang is not supported. Use infer_backend: huggingface."},
    )
    use_kv_cache: bool = key(True, "Keep keys and values of earlier tokens while generating.", group="Inference")
    vllm_maxlen: int = later(
        4096, "Longest prompt and answer of the vLLM engine, in tokens.", "vLLM", group="vLLM", ge=1
    )
    vllm_gpu_util: float = later(0.7, "Share of the GPU's memory that vLLM takes.", "vLLM", group="vLLM", gt=0, le=1)
    vllm_enforce_eager: bool = later(False, "Run vLLM without CUDA graphs.", "vLLM", group="vLLM")
    vllm_max_lora_rank: int = later(32, "Largest adapter rank that vLLM reserves room for.", "vLLM", group="vLLM", ge=1)
    vllm_config: str | None = later(None, "More vLLM engine arguments, as JSON.", "vLLM", group="vLLM")
