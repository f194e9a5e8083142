"""What stacked experts are, as Transformers has them: one parameter for the matrices of all experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fourfold.base.peft import ParamWrapper


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts: 3-D parameters with as many entries as it says it has experts."""
    count = getattr(module, "num_experts", None)
    return any(p.ndim == 3 and len(p) == count for p in module.parameters(recurse=False))


def takes_choices(experts: nn.Module) -> bool:
    """Whether experts are called by Transformers' interface for them: tokens, the experts of each, their weights."""
    # Its decorator leaves what it knows about their matrices as attributes.
    return "is_transposed" in vars(experts)


def find_experts(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts of each layer that has them, by name, in order."""
    return ((name, module) for name, module in root.named_modules() if is_experts(module))


def has_experts(root: nn.Module) -> bool:
    """Whether some layer has stacked experts."""
    return next(find_experts(root), None) is not None


def experts_and_adapters(root: nn.Module) -> list[nn.Module]:
    """The experts of each layer, and the modules around them that add adapters to their parameters."""
    return [module for module in root.modules() if isinstance(module, ParamWrapper) or is_experts(module)]


def number_of_experts(experts: nn.Module) -> int:
    """How many experts a module holds, by its parameters."""
    return next(len(p) for p in experts.parameters(recurse=False) if p.ndim == 3)
