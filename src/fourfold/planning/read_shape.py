"""Reading the shape of a model from Transformers: every parameter of it, without a weight. The one file of the planner
that needs torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fourfold.base.delta_rule_use import exchanged
from fourfold.families.decoder import decoder_of, heads_by_layer, stage_names
from fourfold.families.experts import experts_per_token, largest
from fourfold.families.recurrent import MIXERS
from fourfold.families.shared_positions import caps_scores, has_fused_scores, is_exchangeable, position_obstacles
from fourfold.families.tensor_styles import GATHERS, LINEAR_STYLES, styles_of
from fourfold.planning.shape import Kind, Layer, ModelShape, Weight

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SCALES = frozenset({"logits_scaling", "logit_scale"})
"""Keys of a config by which the head's logits are multiplied or divided."""
_STATE_TOKENS = 1024


def read_shape(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the causal language model that a config describes.

    Raises:
        ValueError: Transformers has no causal language model for it, or its weights are quantised in a way that cannot
            be trained.
    """
    own_bits, own_double_quant = own_quantization(config)
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    prefix, blocks = _blocks(model, text.num_hidden_layers)
    styles = styles_of(model)
    windows = _windows(text)
    reader = _Reader(model, styles)
    name = MIXERS.get(text.model_type, "")
    state_bytes = next((_state_bytes(b, name, text.hidden_size) for b in blocks if hasattr(b, name)), 0)
    own_heads = heads_by_layer(text) or [(0, 0)] * len(blocks)
    layers = [
        Layer(
            tuple(reader.weights(block, f"{prefix}.{number}")),
            window,
            state_bytes=state_bytes if hasattr(block, name) else 0,
            attends=not hasattr(block, name) or hasattr(block, "self_attn"),
            kv_heads=kv_heads,
            head_dim=own_size,
        )
        for number, (block, window, (kv_heads, own_size)) in enumerate(zip(blocks, windows, own_heads, strict=True))
    ]
    kinds = list(dict.fromkeys(layers))
    entries = text.to_dict()
    heads = text.num_attention_heads
    head_dim = entries.get("head_dim") or text.hidden_size // heads
    if entries.get("qk_nope_head_dim"):
        head_dim = entries["qk_nope_head_dim"] + entries["qk_rope_head_dim"]
    has_experts = any(layer.has_experts for layer in kinds)  # a config may have their number, and the model none
    experts = next((entries[key] for key in _EXPERTS if entries.get(key)), 0) if has_experts else 0
    expert_intermediate = largest(entries.get("moe_intermediate_size") or entries.get("intermediate_size") or 0)
    names = [weight.name for kind in kinds for weight in kind.weights]
    return ModelShape(
        family=text.model_type,
        hidden=text.hidden_size,
        intermediate=entries.get("intermediate_size") or 4 * text.hidden_size,
        heads=heads,
        kv_heads=entries.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        value_dim=entries.get("v_head_dim") or head_dim,
        vocab=text.vocab_size,
        max_positions=entries.get("max_position_embeddings") or 0,
        tied=_is_tied(model),
        experts=experts,
        experts_per_token=experts_per_token(text) if experts else 0,
        expert_intermediate=expert_intermediate if experts else 0,
        gated=any("gate" in name and "proj" in name for name in names),
        kinds=tuple(kinds),
        order=tuple(kinds.index(layer) for layer in layers),
        outer=tuple(reader.weights(model, "", without=prefix)),
        own_bits=own_bits,
        own_double_quant=own_double_quant,
        refused=tuple(_refused(model, text)),
        by_offsets=(is_exchangeable(text, type(model)) or text.model_type in MIXERS) and has_fused_scores(text),
        caps_scores=caps_scores(text),
        changed_logits=2 if entries.get("final_logit_softcapping") else int(not _SCALES.isdisjoint(entries)),
    )


def own_quantization(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """Bits of a checkpoint that bitsandbytes has quantised, and whether twice; what the engine expands when it loads
    (models/quantize.py) counts as plain."""
    own = config.to_dict().get("quantization_config") or {}
    method = str(own.get("quant_method", "")) if own else ""
    if method == "bitsandbytes":
        is_four = own.get("load_in_4bit") or own.get("_load_in_4bit")
        return (4, bool(own.get("bnb_4bit_use_double_quant"))) if is_four else (8, False)
    if own and method not in ("mxfp4", "fp8"):
        raise ValueError(f"its checkpoint is quantised by {method or 'an unknown method'}, which cannot be trained")
    return None, False


def _refused(model: PreTrainedModel, text: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Axes that the engine refuses for a model, and why; for stages as far as it shows without weights."""
    for reason in position_obstacles(text, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)):
        yield "cp", reason
    decoder = decoder_of(model)
    names = stage_names(decoder)
    if names is None:
        yield "pp", f"{text.model_type} models are not known to be cut into stages"
        return
    parts = [getattr(decoder, name) for name in names]
    known = {id(p) for part in (*parts, model.get_output_embeddings()) if part is not None for p in part.parameters()}
    elsewhere = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if elsewhere:
        yield "pp", f"{text.model_type} has weights that no stage would own ({elsewhere[0]})"


class _Reader:
    def __init__(self, model: PreTrainedModel, styles: list[tuple[re.Pattern[str], str]]) -> None:
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._styles = styles

    def weights(self, root: nn.Module, path: str, *, without: str | None = None) -> list[Weight]:
        """The parameters of a module, tied ones once; `without` is the name of what is left out."""
        found: list[Weight] = []
        seen: set[int] = set()
        for name, owner in root.named_modules():
            if without is not None and (name == without or name.startswith(f"{without}.")):
                continue
            for own, parameter in owner.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                local = f"{name}.{own}" if name else own
                found.append(self._weight(owner, local, f"{path}.{local}" if path else local, parameter))
        return found

    def _weight(self, owner: nn.Module, name: str, path: str, parameter: nn.Parameter) -> Weight:
        shape = tuple(parameter.shape)
        return Weight(
            name=name,
            shape=shape,
            kind=self._kind(owner, name, shape),
            cut=self._cut(owner, path, shape),
            of_kv=name.split(".")[-2:-1] in (["k_proj"], ["v_proj"]),
            linear=isinstance(owner, nn.Linear) and len(shape) == 2 and owner is not self._head,
            gathered=len(shape) == 2 and self._style(path.rsplit(".", 1)[0]) == GATHERS and owner is not self._head,
        )

    def _kind(self, owner: nn.Module, name: str, shape: tuple[int, ...]) -> Kind:
        if owner is self._embedding:
            return "embedding"
        if owner is self._head:
            return "head"
        if isinstance(owner, nn.Conv1d):
            return "other"
        if len(shape) == 3 or ".experts." in f".{name}":
            return "experts"
        parts = set(name.split("."))
        if "norm" in name.rsplit(".", 1)[0].lower():
            return "norm"
        if parts & {"router", "gate"}:
            return "router"
        if any("attn" in part or "attention" in part for part in parts):
            return "attention"
        return "mlp" if any("mlp" in part or "feed_forward" in part for part in parts) else "other"

    def _cut(self, owner: nn.Module, path: str, shape: tuple[int, ...]) -> int | None:
        if owner is self._embedding or owner is self._head:
            return 0
        style = self._style(path)
        if style is None:
            style = self._style(path.rsplit(".", 1)[0])
            style = style if style in LINEAR_STYLES else None
        if style is None:
            return None
        if len(shape) == 1:
            return 0 if style.startswith("colwise") else None
        if style.startswith("colwise"):
            return 0
        return {"packed_colwise": len(shape) - 2, "rowwise": len(shape) - 1, "rowwise_split_input": 1}.get(style)

    def _style(self, path: str) -> str | None:
        return next((style for pattern, style in self._styles if pattern.fullmatch(path)), None)


def _blocks(model: PreTrainedModel, count: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"a {model.config.model_type} model has no list of {count} decoder layers")


def _state_bytes(block: nn.Module, name: str, hidden: int) -> int:
    """What the module that carries a state keeps of a position for its backward pass in 16 bits, by running it without
    numbers; with kernels that want numbers, 0.

    Its inputs are counted as if all of its linear layers were trained, or had adapters, and nothing else of it.
    """
    mixer = copy.deepcopy(getattr(block, name)).to(torch.bfloat16).train().requires_grad_(False)
    for module in mixer.modules():
        module.requires_grad_(isinstance(module, nn.Linear))
    weights = {parameter.untyped_storage()._cdata for parameter in mixer.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage
        return tensor

    inputs = torch.empty(1, _STATE_TOKENS, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    try:
        with exchanged(mixer), saved_tensors_hooks(note, lambda tensor: tensor):
            mixer(inputs)
    except (RuntimeError, NotImplementedError, TypeError):
        return 0
    return sum(storage.nbytes() for storage in seen.values()) // _STATE_TOKENS


def _windows(text: PreTrainedConfig) -> list[int | None]:
    """For each layer how far its attention sees."""
    entries = text.to_dict()
    window = entries.get("sliding_window")
    kinds = entries.get("layer_types") or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    return [window if "sliding" in kind or "chunked" in kind else None for kind in kinds]


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)
