"""Keys of the training itself: stage, batch, steps, optimizer, precision, evaluation."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.key import Count, Folder, Options, Section, key

_ADAMW = (
    "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused", "adamw_anyprecision",
    "adamw_hf", "adamw", "paged_adamw_32bit", "paged_adamw",
)  # fmt: skip
_ADAMW_8BIT = ("adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit")
_LOW_RANK = "{} is not supported. Use optim: adamw_8bit, or finetuning_type: lora, to save memory."
_GALORE = (
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
)  # fmt: skip
_APOLLO = ("apollo_adamw", "apollo_adamw_layerwise")


class TrainingConfig(Section):
    """Stage, batch size, optimizer, schedule, precision, memory and evaluation."""

    title: ClassVar[str] = "Training"

    stage: str = key(
        "sft",
        "What is learnt: pt (plain text), sft (answers), rm, dpo, kto, ppo, grpo, kd.",
        folder=Folder("fourfold.objectives"),
        also=("pt", "sft", "rm", "dpo", "kto", "ppo", "grpo", "kd"),
    )
    do_train: bool = key(False, "Train. Without do_train, do_eval and do_predict the verb train still trains.")
    do_eval: bool = key(False, "Evaluate after training, or without it.")
    do_predict: bool = key(False, "As do_eval, with the figures in a file of their own.")
    predict_with_generate: bool = key(
        False, "Let do_eval and do_predict generate answers, and tell how like the labels they are (BLEU, ROUGE)."
    )
    num_train_epochs: float = key(3.0, "Passes over the data.", gt=0)
    max_steps: int = key(-1, "Optimizer steps; above 0 it goes before num_train_epochs.", ge=-1)
    per_device_train_batch_size: int = key(8, "Sequences per data-parallel rank and micro-batch.", ge=1)
    gradient_accumulation_steps: int = key(1, "Micro-batches per optimizer step.", ge=1)
    global_batch_size: int | None = key(
        None, "Sequences per optimizer step over all ranks; given instead of gradient_accumulation_steps.", ge=1
    )
    micro_batch_tokens: int | None = key(
        None, "Most tokens of one forward pass; a step is cut to it. The loss does not depend on it.", ge=1
    )
    disable_shuffling: bool = key(False, "Train the rows in the order of the file.")
    seed: int = key(42, "Seed of weights, data order and dropout.", ge=0, lt=2**32)
    data_seed: int | None = key(None, "Seed of the data order; default: seed.", ge=0, lt=2**32)
    full_determinism: bool = key(False, "Use deterministic kernels only; slower.")
    neftune_noise_alpha: float | None = key(None, "NEFTune: noise on the input embeddings; 5 is usual.", ge=0)
    use_dft_loss: bool = key(
        False,
        "Stage sft: weight each token's loss by its own probability, taken for a constant (DFT, arXiv 2508.05629).",
    )
    compute_accuracy: bool = key(False, "Report token accuracy when evaluating.")

    learning_rate: float = key(5e-5, "Highest learning rate.", group="Optimizer", gt=0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
    ] = key("linear", "How the learning rate moves.", group="Optimizer")  # fmt: skip
    lr_scheduler_kwargs: Options = key({}, "More settings of the schedule, e.g. {min_lr: 1e-6}.", group="Optimizer")
    warmup_ratio: float = key(
        0.0, "Share of all steps in which the learning rate rises.", group="Optimizer", ge=0, le=1
    )
    warmup_steps: Count = key(
        0, "Steps in which the learning rate rises; above 0 it goes before warmup_ratio; below 1 it is a share.",
        group="Optimizer", ge=0,
    )  # fmt: skip
    optim: str = key(
        "adamw_torch",
        "The optimizer.",
        group="Optimizer",
        folder=Folder("fourfold.training.optimizers"),
        renamed=dict.fromkeys(_ADAMW, "adamw_torch") | dict.fromkeys(_ADAMW_8BIT, "adamw_8bit"),
        refused=dict.fromkeys(_GALORE, _LOW_RANK.format("GaLore")) | dict.fromkeys(_APOLLO, _LOW_RANK.format("APOLLO")),
    )
    optim_args: Options = key({}, "More settings of the optimizer, e.g. momentum=0.9,nesterov=true.", group="Optimizer")
    weight_decay: float = key(0.0, "Weight decay; not on biases and norms.", group="Optimizer", ge=0)
    adam_beta1: float = key(0.9, "Adam: decay of the first moment.", group="Optimizer", ge=0, lt=1)
    adam_beta2: float = key(0.999, "Adam: decay of the second moment.", group="Optimizer", ge=0, lt=1)
    adam_epsilon: float = key(1e-8, "Adam: added to the root of the second moment.", group="Optimizer", ge=0)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this norm; 0 leaves them.", group="Optimizer", ge=0)

    bf16: bool = key(
        False, "Compute in bfloat16 (weights that are trained stay in fp32).", group="Precision and memory"
    )
    fp16: bool = key(False, "Compute in float16 with loss scaling; needs a GPU.", group="Precision and memory")
    pure_bf16: bool = key(False, "Hold trained weights in bfloat16 too.", group="Precision and memory")
    tf32: bool | None = key(None, "Allow TensorFloat-32 products.", group="Precision and memory")
    use_cpu: bool = key(False, "Train on the CPU though there is a GPU.", group="Precision and memory")
    gradient_checkpointing: bool | None = key(
        None, "Compute activations again in the backward pass; default: when memory needs it.",
        group="Precision and memory",
    )  # fmt: skip
    torch_compile: bool | None = key(
        None,
        "Compile the decoder layers; default: on GPUs, in runs that are long enough for it to pay.",
        group="Precision and memory",
    )
    cuda_graphs: bool | None = key(
        None,
        "Replay small micro-batches as CUDA graphs; default: on one GPU, where the model allows it.",
        group="Precision and memory",
    )
    disable_gradient_checkpointing: bool = key(
        False, "The same as gradient_checkpointing: false.", group="Precision and memory"
    )
    fp8: bool = key(
        False,
        "Multiply with trained matrices in float8, the rest in bf16; needs a GPU that has it (H100, RTX 4090 and "
        "later). Saves memory.",
        group="Precision and memory",
    )

    eval_strategy: Literal["no", "steps", "epoch"] = key("no", "When to evaluate while training.", group="Evaluation")
    eval_steps: Count | None = key(
        None, "Steps between evaluations; below 1 a share of all; default: logging_steps.", group="Evaluation", gt=0
    )
    eval_delay: float = key(0.0, "Steps or epochs before the first evaluation.", group="Evaluation", ge=0)
    eval_on_start: bool = key(False, "Evaluate before the first step.", group="Evaluation")
    per_device_eval_batch_size: int = key(8, "Sequences per rank when evaluating.", group="Evaluation", ge=1)
    early_stopping_steps: int | None = key(
        None, "Stop after this many evaluations without a better result.", group="Evaluation", ge=1
    )
    load_best_model_at_end: bool = key(False, "End with the best checkpoint instead of the last.", group="Evaluation")
    metric_for_best_model: str | None = key(None, "What best means; default: loss.", group="Evaluation")
    greater_is_better: bool | None = key(
        None, "Whether a higher metric is better; default: unless its name ends in loss.", group="Evaluation"
    )
