"""A Triton kernel of AdamW that clips gradients as it reads them.

Scaling the gradients first reads and writes them once more, 8 bytes beside the 28 that an update moves for each number
in fp32; torch's own `grad_scale` writes them back as well. A copy in 16 bits, which products need, is written along.

Imported only where it runs: on CUDA, where PyTorch brings Triton along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCK = 1024
"""Numbers of one program: two vectors of 16 bytes in fp32 for each thread and tensor."""


@triton.jit
def _update(  # no annotations but constexpr: the compiler reads them
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    numbers,
    num,
    beta1,
    beta2,
    eps,
    decay,
    block: tl.constexpr,
    whole: tl.constexpr,
    copies: tl.constexpr,
):
    if tl.load(numbers + 3) != 0:  # fp16 overflowed
        return
    start = tl.program_id(0).to(tl.int64) * block  # a tensor may have more than 2^31 numbers
    place = tl.arange(0, block)
    param, grad, exp_avg, exp_avg_sq = param + start, grad + start, exp_avg + start, exp_avg_sq + start
    there = None if whole else place < num - start
    p = tl.load(param + place, mask=there).to(tl.float32)
    g = tl.load(grad + place, mask=there).to(tl.float32)
    m = tl.load(exp_avg + place, mask=there).to(tl.float32)
    v = tl.load(exp_avg_sq + place, mask=there).to(tl.float32)
    g = g * tl.load(numbers + 2)
    p = p - decay * p
    # As torch: beta * old + (new - beta * new). 1 - beta is exact for a beta of fp32 from 0.5 on.
    m = tl.fma(m, beta1, g * (1.0 - beta1))
    v = tl.fma(v, beta2, g * g * (1.0 - beta2))
    p = p - tl.div_rn(tl.load(numbers) * m, tl.sqrt_rn(v) * tl.load(numbers + 1) + eps)
    tl.store(param + place, p.to(param.dtype.element_ty), mask=there)
    if copies:
        tl.store(copy + start + place, p.to(param.dtype.element_ty).to(copy.dtype.element_ty), mask=there)
    tl.store(exp_avg + place, m.to(exp_avg.dtype.element_ty), mask=there)
    tl.store(exp_avg_sq + place, v.to(exp_avg_sq.dtype.element_ty), mask=there)


def update_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    copy: Tensor | None = None,
) -> None:
    """Update a parameter and its moments in place, by the arithmetic of torch's fused AdamW, in fp32.

    Args:
        param, grad, exp_avg, exp_avg_sq: contiguous, of one shape, fp32 or bf16 each; the gradient is only read.
        numbers: fp32 [4] on the device: the learning rate over the first moment's bias correction, one over the root of
            the second's, what gradients are multiplied by, and whether the update is skipped (not 0).
        decay: learning rate times weight decay.
        copy: contiguous, of the same shape; becomes the parameter in its own dtype, unless the update is skipped.
    """
    assert copy is None or (copy.is_contiguous() and copy.shape == param.shape)
    assert all(tensor.is_contiguous() for tensor in (param, grad, exp_avg, exp_avg_sq))
    assert numbers.dtype == torch.float32
    num = param.numel()
    launch: Any = _update
    launch[(triton.cdiv(num, _BLOCK),)](
        param, grad, exp_avg, exp_avg_sq, param if copy is None else copy, numbers, num, beta1, beta2, eps, decay,
        block=_BLOCK, whole=num % _BLOCK == 0, copies=copy is not None,
    )  # fmt: skip
