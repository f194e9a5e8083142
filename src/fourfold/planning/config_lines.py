"""The keys that make a config run a layout: what `resolve_layout` reads back as exactly that layout."""

from __future__ import annotations

from typing import Any

from fourfold.config.parallel import ParallelConfig
from fourfold.planning.layout import Layout, resolve_layout
from fourfold.planning.predictor import Form
from fourfold.planning.wishes import Wishes

_DEFAULTS = ParallelConfig()


def config_of(form: Form, wishes: Wishes | None = None, *, recompute: bool = True) -> dict[str, Any]:
    """The keys for a form: strategy, the mapping `parallel` and micro_batch_tokens.

    Args:
        wishes: whose strategy is kept if it names one.
        recompute: say what is computed again; else the run finds out.
    """
    layout, asked = form.layout, "auto" if wishes is None else wishes.parallel.strategy
    strategy = asked if asked != "auto" else strategy_of(layout)
    parallel: dict[str, Any] = {name: size for name, size in layout.sizes().items() if size > 1}
    # what a strategy would take the rest of the world for is said, so that another number of ranks is an error
    if strategy == "hsdp":
        parallel |= {"dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard}
    parallel |= _settings(layout)
    if recompute:
        parallel["recompute"] = form.recompute
    keys = {"strategy": strategy, "parallel": parallel, "micro_batch_tokens": form.micro_batch}
    assert resolve_layout(parallel_config(keys), layout.world_size) == layout, (layout, keys)
    return keys


def parallel_config(keys: dict[str, Any]) -> ParallelConfig:
    """The section that such keys make."""
    return ParallelConfig(strategy=keys["strategy"], **keys["parallel"])


def strategy_of(layout: Layout) -> str:
    """The strategy whose name says most of a layout."""
    shards = layout.dp_shard > 1 or layout.cp_shards
    if layout.world_size == 1:
        return "single"
    if shards and layout.zero < 3:
        return f"zero{layout.zero}"
    if shards:
        return "hsdp" if layout.dp_replicate > 1 else "fsdp"
    if layout.dp_replicate > 1:
        return "ddp"
    return "tp" if layout.tp == layout.world_size else "pp" if layout.pp == layout.world_size else "custom"


def _settings(layout: Layout) -> dict[str, Any]:
    """Settings of the axes in use that are not the default."""
    found: dict[str, Any] = {}
    if layout.cp > 1:
        found["cp_method"] = layout.cp_method
    if layout.pp > 1:
        found["pp_schedule"] = layout.pp_schedule
    rest = {
        "pp_microbatches": layout.pp_microbatches or None,
        "pp_layers_per_stage": list(layout.pp_layers) or None,
        "pp_overlap_p2p": None if layout.pp_overlap_p2p else False,
        "reshard_after_forward": layout.reshard,
        "offload": layout.offload if layout.offload != "none" else None,
        # kept where the user gave them for axes that are not in use, so that the layout is the same
        "cp_method": layout.cp_method if layout.cp_method != _DEFAULTS.cp_method else None,
        "pp_schedule": layout.pp_schedule if layout.pp_schedule != _DEFAULTS.pp_schedule else None,
        "sequence_parallel": False if not layout.sequence_parallel else None,
        "loss_parallel": False if not layout.loss_parallel else None,
    }
    return found | {name: value for name, value in rest.items() if value is not None}


def config_lines(keys: dict[str, Any]) -> list[str]:
    """The keys as lines of YAML."""
    lines: list[str] = []
    for name, value in keys.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {inner}: {_scalar(setting)}" for inner, setting in value.items())]
        else:
            lines.append(f"{name}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
