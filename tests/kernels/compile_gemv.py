"""Builds of the product of few input rows that its tests look at, as its launcher makes them; see compiling.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compiling import Compiled
from recorded import recorded

from quantpress.kernels import gemv
from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.packed import PackedWeight


def case(
    rows_in: int, columns: int, bits: int, group: int, dtype: torch.dtype, *, zero: bool = False, order: bool = False,
    stages: int = 0,
) -> Compiled:  # fmt: skip
    """A product with 28672 outputs and a bias, launched as arithmetic says or with so many stages."""
    rows, groups = 28672, -(-columns // group)
    name = str(dtype).removeprefix("torch.")
    launch = gemv.gemv_launch(Problem(rows_in, rows, columns, bits, group, name, not zero))
    if stages:
        launch = Launch("gemv", 1, launch.block_n, launch.block_k, launch.split_k, launch.warps, stages)
    weight = PackedWeight(
        torch.empty((-(-columns * bits // 32), rows), dtype=torch.int32, device="meta"),
        torch.empty((groups, rows), dtype=dtype, device="meta"),
        torch.empty((groups, rows), dtype=torch.uint8, device="meta") if zero else None,
        torch.empty(columns, dtype=torch.int64, device="meta") if order else None, columns, bits, group,
    )  # fmt: skip
    x = torch.empty((rows_in, columns), dtype=dtype, device="meta")
    bias = torch.empty(rows, dtype=dtype, device="meta")
    title = f"{bits} bits, {rows_in} rows, group {group} of {columns}, {name}{', zeros' if zero else ''}, {launch}"
    return recorded(title, gemv, lambda: gemv.gemv(x, weight, bias, launch=launch))


CASES = [
    case(1, 4096, 4, 128, torch.bfloat16),
    case(1, 4096, 4, 32, torch.float16, zero=True),
    case(1, 4096, 3, 4096, torch.bfloat16),
    case(2, 4100, 8, 64, torch.bfloat16, order=True, stages=3),
]
