"""A small module that is cut in every way: several ranges, columns, copies, experts, and FSDP over what is left."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fourfold.parallel.shares import Cut, Share, Shares


class Block(nn.Module):
    """A fused matrix cut in two ranges of rows, one cut by columns, one that two ranks hold alike, and a whole norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fused = nn.Linear(6, 14, bias=False)
        self.down = nn.Linear(7, 6)
        self.keys = nn.Linear(6, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(5, 4, 3))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Something that reaches every parameter, whatever its size."""
        return sum((p.float().square().sum() for p in self.parameters()), x.sum())


def _cuts(rank: int) -> dict[tuple[str, str], tuple[Cut, ...]]:
    """What tensor-parallel rank 0 or 1 of 2 holds; uneven on purpose."""
    rows = ((0, 4), (7, 11)) if rank == 0 else ((4, 7), (11, 14))
    columns = (0, 4) if rank == 0 else (4, 7)
    experts = ((0, 1), (3, 4)) if rank == 0 else ((1, 3), (4, 5))
    return {
        ("fused", "weight"): (Cut(0, rows),),
        ("down", "weight"): (Cut(1, (columns,)),),
        ("", "experts"): (Cut(0, experts), Cut(2, ((0, 3),))),
        ("keys", "weight"): (),
    }


def split(block: Block, dp: int, tp: int) -> Shares:
    """Cut the block for this rank, and shard what is left by FSDP where there are data-parallel ranks."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    rank, shares = mesh["tp"].get_local_rank(), Shares()
    if tp > 1:
        for (path, name), cuts in _cuts(rank).items():
            module = block.get_submodule(path)
            whole = getattr(module, name).detach()
            share = Share(tuple(whole.shape), cuts, parts=2 if cuts else 1)
            setattr(module, name, nn.Parameter(share.take(whole)))
            shares.put(module, name, share)
    if dp > 1:
        fully_shard(block, mesh=mesh["dp"])
    return shares
