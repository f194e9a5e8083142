"""Expert parallelism: each rank of a group holds some of the experts, and tokens travel to them and back.

Nothing of a model's own code is replaced but the way into its experts. The router chooses among all experts as ever;
each (token, expert) pair is sent to the rank that holds the expert (one all-to-all), the experts' own forward pass runs
there on what has arrived, and the results are sent back (a second all-to-all) and weighted where the token lives. The
backward pass goes the same way in reverse, so the gradient of an expert is complete on the rank that holds it: it has
seen the tokens of the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fourfold.base.errors import PlanError
from fourfold.base.peft import ParamWrapper
from fourfold.parallel.dispatch import Dispatch
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.shares import Cut, Share, Shares
from fourfold.parallel.stacked_experts import find_experts, number_of_experts, takes_choices


def split_experts(root: nn.Module, mesh: Mesh, shares: Shares) -> list[nn.Module]:
    """Leave this rank its part of every layer's experts, in place, and route tokens between the ranks.

    Args:
        root: the model, adapters included.
        mesh: with `ep` larger than 1.
        shares: where the parts are noted.
    Returns:
        what FSDP must shard apart from the layers: the experts of each layer, with the adapters around them.
    """
    assert mesh.expert_mesh is not None, "a mesh without expert parallelism"
    group, index = mesh.expert_mesh.get_group("ep"), mesh.expert_mesh.get_local_rank("ep")
    apart: list[nn.Module] = []
    for _, experts in list(find_experts(root)):
        part = _Part.of(experts, index, mesh.layout.ep)
        wrappers = [m for m in root.modules() if isinstance(m, ParamWrapper) and m.get_base_layer() is experts]
        for parameter in dict(experts.named_parameters(recurse=False)):
            part.keep(experts, parameter, part.rows(), shares)
        for wrapper in wrappers:
            _cut_adapters(wrapper, part, shares)
        experts.num_experts = part.count  # type: ignore[assignment] - an int, though modules hold tensors
        experts.forward = Dispatch(experts, group, part.count)
        apart.append(wrappers[0] if wrappers else experts)
    return apart


@dataclass(frozen=True, slots=True)
class _Part:
    """Which of `total` experts a rank holds: `count` of them from `start` on."""

    start: int
    count: int
    total: int

    @classmethod
    def of(cls, experts: nn.Module, index: int, ranks: int) -> _Part:
        total = number_of_experts(experts)
        count = total // ranks
        return cls(index * count, count, total)

    def rows(self, each: int = 1) -> tuple[tuple[int, int], ...]:
        """Where the experts lie in a dimension that holds `each` entries of the first, then of the second, ..."""
        return ((self.start * each, (self.start + self.count) * each),)

    def strided(self, times: int) -> tuple[tuple[int, int], ...]:
        """Where they lie in a dimension that repeats all experts `times` times."""
        return tuple((k * self.total + self.start, k * self.total + self.start + self.count) for k in range(times))

    def keep(
        self, module: nn.Module, name: str, ranges: tuple[tuple[int, int], ...], shares: Shares, dim: int = 0
    ) -> None:
        """Replace `module.<name>` by the entries of this rank, and note what they are."""
        whole = module.get_parameter(name)
        noted = shares.get(module, name) or Share(tuple(whole.shape))
        cut = Cut(dim, ranges)
        share = replace(noted, cuts=(*noted.cuts, cut), parts=noted.parts * self.total // self.count)
        setattr(module, name, nn.Parameter(cut.take(whole.detach()), requires_grad=whole.requires_grad))
        shares.put(module, name, share)


def _cut_adapters(wrapper: ParamWrapper, part: _Part, shares: Shares) -> None:
    """Cut LoRA matrices as PEFT stacks them: A [experts * r, in], B [out, r * experts]."""
    for adapter, lora_a in wrapper.lora_A.items():
        rank = wrapper.r[adapter]
        lora_b = wrapper.lora_B[adapter]
        part.keep(lora_a, "weight", part.rows(rank), shares)
        part.keep(lora_b, "weight", part.strided(rank), shares, dim=1)
        lora_a.out_features = lora_b.in_features = part.count * rank
    wrapper.num_experts = part.count
    # PEFT takes a single expert for a plain matrix, and has to be told if it lies the other way round.
    wrapper.fan_in_fan_out = part.count == 1 and bool(wrapper.get_base_layer().is_transposed)


def check_experts(root: nn.Module, ranks: int) -> None:
    """Refuse a model whose experts cannot be cut over so many ranks, before anything is.

    Raises:
        PlanError: there are none, their number does not divide, or they cannot be run on some tokens alone.
    """
    found = list(find_experts(root))
    if not found:
        raise PlanError(
            f"parallel.ep: {ranks} ranks cannot share the experts of this model ({type(root).__name__}), which are not "
            "stacked in one parameter. Use parallel.ep: 1; dp_shard shards them."
        )
    for name, experts in found:
        total = number_of_experts(experts)
        if total % ranks:
            raise PlanError(
                f"parallel.ep: {ranks} does not divide the {total} experts of {name}. Use a size that does."
            )
        others = [n for n, p in experts.named_parameters() if len(p) != total or "." in n]
        if others or not takes_choices(experts):
            what = f"parameters for all of them ({others[0]})" if others else "a forward pass of their own"
            raise PlanError(
                f"parallel.ep: the experts of this model ({name}, {type(experts).__name__}) have {what}, so tokens "
                "cannot be sent to them on other ranks. Use parallel.ep: 1; dp_shard shards them."
            )
