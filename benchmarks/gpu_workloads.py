"""The workloads of gpu.py: the shape, what the user's file says, and how the peers are set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gpu_floor import FULL, FULL_RECOMPUTED, LORA, LORA_PAIRS, LORA_RECOMPUTED, Cost

Data = Literal["chat", "text", "pairs"]

CHAT: dict[str, Any] = {
    "stage": "sft",
    "dataset": "identity,alpaca_en_demo",
    "dataset_vars": {"name": "Fourfold", "author": "the Fourfold project"},
    "template": "llama3",
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "learning_rate": 5e-05,
    "num_train_epochs": 3.0,
    "max_samples": 500,
    "loraplus_lr_ratio": 16.0,
    "bf16": True,
}
"""The file that a new user brings. LoRA+ is the user's; the peers go without, which costs them nothing."""

TEXT: dict[str, Any] = {
    "stage": "pt",
    "packing": False,
    "dataset": "texts",
    "lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1000.0,
}
LORA_TEXT: dict[str, Any] = {**TEXT, **{key: CHAT[key] for key in ("finetuning_type", "lora_target", "lora_rank")}}
LORA_TEXT |= {"learning_rate": 1e-4, "bf16": True}
FULL_TEXT: dict[str, Any] = {**TEXT, "finetuning_type": "full", "learning_rate": 1e-5}
PAIRS: dict[str, Any] = {
    **{key: CHAT[key] for key in ("template", "finetuning_type", "lora_target", "lora_rank", "lr_scheduler_type")},
    "stage": "dpo",
    "dataset": "pairs",
    "pref_beta": 0.1,
    "learning_rate": 5e-6,
    "num_train_epochs": 1000.0,
    "bf16": True,
}


@dataclass(frozen=True)
class Setting:
    """How a peer cuts and recomputes a step.

    Attributes:
        micro_batch: sequences (dpo: pairs) of a forward pass.
        accumulation: micro-batches of a step.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool


@dataclass(frozen=True)
class Peer:
    """A program that does the same work.

    Attributes:
        settings: tried in order until one fits into memory.
        loop: `trainer` is Transformers' own Trainer, `trl` TRL's; the others are in gpu_hf_loops.py.
        needs: package without which there is no such peer.
        program: file of benchmarks that runs it.
        experts, attention: `experts_implementation` and `attn_implementation` of Transformers.
    """

    settings: tuple[Setting, ...]
    loop: Literal["trainer", "pairs", "doubling", "trl"] = "trainer"
    needs: str | None = None
    program: str = "gpu_hf.py"
    experts: str | None = None
    attention: str | None = None


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        model: folder of examples/models; config: keys that are put over its config.json.
        keys: Fourfold's config, but for model, data, output and steps.
        data: what rows are made; seq_len: tokens of each (chat: on average, as they come).
        unit: what its speed is counted in.
        steps: at most so many steps, warm-up and measured; None for what the command line says.
        mfu: whether MFU is told beside.
    """

    model: str
    keys: dict[str, Any]
    data: Data
    seq_len: int
    cost: Cost
    peers: dict[str, Peer]
    config: dict[str, Any] = field(default_factory=dict)
    unit: Literal["samples", "tokens"] = "tokens"
    steps: tuple[int, int] | None = None
    mfu: bool = False
    nf4: bool = False

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step."""
        return self.keys["per_device_train_batch_size"] * self.keys["gradient_accumulation_steps"]


def _trainers(default: Setting, *tuned: Setting, liger: bool = True) -> dict[str, Peer]:
    """Trainer as LLaMA-Factory's defaults set it, as one sets it by hand, and that with Liger's kernels."""
    peers = {"hf_default": Peer((default,)), "hf_tuned": Peer(tuned)}
    return {**peers, "hf_liger": Peer(tuned, needs="liger_kernel")} if liger else peers


def _unsloth(default: Setting, *tuned: Setting) -> dict[str, Peer]:
    """Unsloth as its examples set it, and without its checkpointing."""
    settings = {"unsloth_default": (default,), "unsloth_tuned": tuned}
    return {name: Peer(those, needs="unsloth", program="gpu_unsloth.py") for name, those in settings.items()}


def _full_3b(rows: int, *, fp8: bool = False, **peers: Peer) -> Workload:
    """So many rows a step, none computed again."""
    keys = {**FULL_TEXT, "bf16": True, "per_device_train_batch_size": rows, "parallel": {"recompute": "none"}}
    return Workload("Llama-3.2-3B", keys | ({"fp8": True} if fp8 else {}), "text", 4096, FULL, peers, mfu=True)


_CHAT_SETTINGS = (Setting(2, 4, True), Setting(8, 1, False), Setting(4, 2, False))
_CHAT_PEERS = _trainers(*_CHAT_SETTINGS, liger=False) | _unsloth(*_CHAT_SETTINGS)
_HYBRID_PEERS = _trainers(*_CHAT_SETTINGS, liger=False)
_LORA_4K_SETTINGS = (Setting(2, 1, True), Setting(2, 1, False), Setting(1, 2, False))
_EXPERTS = (Setting(4, 1, False), Setting(2, 2, False), Setting(1, 4, False), Setting(2, 2, True))
_SINKS = (Setting(2, 1, False), Setting(1, 2, False), Setting(2, 1, True), Setting(1, 2, True))
_PAIRS_TUNED = (Setting(4, 1, False), Setting(2, 2, False), Setting(1, 4, False))

WORKLOADS: dict[str, Workload] = {
    "chat_nf4": Workload("Llama-3-8B", CHAT, "chat", 149, LORA, _CHAT_PEERS, unit="samples", nf4=True),
    "chat_bf16": Workload("Llama-3-8B", CHAT, "chat", 149, LORA, _CHAT_PEERS, unit="samples"),
    "chat_low": Workload(
        "Llama-3-8B", {**CHAT, "memory": "low"}, "chat", 149, LORA_RECOMPUTED, _CHAT_PEERS, unit="samples", nf4=True
    ),
    "lora_4k": Workload(
        "Llama-3-8B",
        {**LORA_TEXT, "per_device_train_batch_size": 2, "parallel": {"recompute": "none"}},
        *("text", 4096, LORA),
        _trainers(*_LORA_4K_SETTINGS) | _unsloth(*_LORA_4K_SETTINGS),
    ),
    "full_3b": _full_3b(
        2,
        hf_tuned=Peer((Setting(2, 1, False), Setting(1, 2, False))),
        hf_liger=Peer((Setting(2, 1, False), Setting(1, 2, False)), needs="liger_kernel"),
    ),
    "full_3b_four": _full_3b(4, hf_tuned=Peer((Setting(4, 1, False), Setting(2, 2, False), Setting(1, 4, False)))),
    "full_3b_eight": _full_3b(8),
    "full_3b_float8": _full_3b(2, fp8=True),
    "full_3b_float8_four": _full_3b(4, fp8=True),
    "full_3b_float8_eight": _full_3b(8, fp8=True),
    "full_3b_recompute": Workload(
        "Llama-3.2-3B",
        {**FULL_TEXT, "bf16": True, "per_device_train_batch_size": 4, "parallel": {"recompute": "full"}},
        *("text", 4096, FULL_RECOMPUTED),
        {
            "hf_default": Peer((Setting(4, 1, True), Setting(2, 2, True))),
            "hf_liger": Peer((Setting(4, 1, True), Setting(2, 2, True)), needs="liger_kernel"),
        },
        mfu=True,
    ),
    "moe": Workload(
        "Qwen3-30B-A3B",
        {**FULL_TEXT, "pure_bf16": True, "per_device_train_batch_size": 4},
        *("text", 4096, FULL),
        {
            "hf_grouped_mm": Peer(_EXPERTS, experts="grouped_mm"),
            "hf_eager": Peer(_EXPERTS, experts="eager"),
        },
        config={"num_hidden_layers": 8},
    ),
    "gpt_oss": Workload(
        "gpt-oss-20b",
        {**LORA_TEXT, "lora_target": "q_proj,k_proj,v_proj,o_proj", "per_device_train_batch_size": 2},
        *("text", 4096, LORA),
        {
            "hf_flex": Peer(_SINKS, experts="grouped_mm", attention="flex_attention"),
            "hf_eager": Peer(_SINKS, experts="grouped_mm", attention="eager"),
        },
    ),
    "hybrid_chat": Workload("Qwen3.5-9B", CHAT, "chat", 149, LORA, _HYBRID_PEERS, unit="samples"),
    "hybrid_4k": Workload(
        "Qwen3.5-9B",
        {**LORA_TEXT, "per_device_train_batch_size": 2},
        *("text", 4096, LORA),
        _trainers(*_LORA_4K_SETTINGS, liger=False),
    ),
    "dpo": Workload(
        "Llama-3-8B",
        {**PAIRS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        *("pairs", 1024, LORA_PAIRS),
        {
            "hf_default": Peer((Setting(1, 4, True),), loop="pairs"),
            "hf_tuned": Peer(_PAIRS_TUNED, loop="pairs"),
            "trl": Peer(_PAIRS_TUNED, loop="trl", needs="trl"),
        },
    ),
    "long": Workload(
        "Llama-3-8B",
        {**LORA_TEXT, "per_device_train_batch_size": 1, "parallel": {"recompute": "full"}},
        *("text", 131_072, LORA_RECOMPUTED),
        {"hf_doubling": Peer((Setting(1, 1, True),), loop="doubling")},
        config={"max_position_embeddings": 131_072},
        steps=(1, 1),
    ),
}

TINY_VOCABULARY = 2048
_TINY_LENGTHS = {4096: 64, 1024: 48, 131_072: 256, 149: 149}
_TINY: dict[str, Any] = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_TINY_PARTS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Qwen3.5-9B": {
        "layer_types": ["linear_attention", "full_attention"],
        **{f"linear_num_{what}_heads": 2 for what in ("key", "value")},
        **{f"linear_{what}_head_dim": 16 for what in ("key", "value")},
    },
    "gpt-oss-20b": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def tiny(workload: Workload) -> Workload:
    """The same with a model of some hundred kilobytes and short rows, for any machine."""
    parts = _TINY_PARTS.get(workload.model, {})
    return replace(workload, config={**workload.config, **_TINY, **parts}, seq_len=_TINY_LENGTHS[workload.seq_len])
