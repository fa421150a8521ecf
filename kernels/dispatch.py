"""Which kernel multiplies: GEMV for one row of input, split along K for few, tiles or cuBLAS for many."""

from __future__ import annotations

import torch

from quantpress.kernels.dequantize import dequantize
from quantpress.kernels.gemv import gemv
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight
from quantpress.kernels.tiled import tiled
from quantpress.kernels.tuning.choice import choose

__all__ = ["matmul", "problem_of", "run"]


def problem_of(x: torch.Tensor, weight: PackedWeight) -> Problem:
    """Gives what the choice of a kernel for (M, K) inputs depends on."""
    return Problem(
        rows_in=len(x), rows=weight.rows, columns=weight.columns, bits=weight.bits, group_size=weight.group_size,
        dtype=str(x.dtype).removeprefix("torch."), symmetric=weight.zero is None,
    )  # fmt: skip


def matmul(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, deterministic: bool = False
) -> torch.Tensor:
    """Computes x W^T + bias with the kernel that was found fastest for such a product.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous, on the device of the weight.
        weight: (N, K).
        bias: (N,) of the type of `x`.
        deterministic: no sum is added up in an order that can change.

    Returns:
        (M, N) of the type of `x`.
    """
    if not len(x):
        return x.new_empty((0, weight.rows))
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else ""
    return run(x, weight, bias, launch=choose(problem_of(x, weight), name), deterministic=deterministic)


def run(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, launch: Launch,
    deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Computes the same with the kernel that `launch` names: "gemv", "tiled" or "dense".

    "dense" is cuBLAS on weights that are rounded to the type of `x`, which are thrown away after it.
    """
    if launch.kernel == "gemv":
        return gemv(x, weight, bias, launch=launch, deterministic=deterministic)
    if launch.kernel == "tiled":
        return tiled(x, weight, bias, launch=launch, deterministic=deterministic)
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
