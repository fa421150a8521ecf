"""Matrices in the 4-bit types of bitsandbytes, NF4 and FP4, and products with them where they lie.

The codes of a matrix (N, K) are one row of values, cut into blocks that share an absmax; two codes share a byte, the
first in its high half. `weight = level[code] * absmax`, both float32. Which levels there are is up to the caller: they
are an argument, so NF4, FP4 and any other table of 16 take the same time.

Up to four input rows nothing but the result is rounded to less than float32; with more, the weights are rounded to the
type of the inputs as bitsandbytes rounds them when it dequantizes. Sums that several programs share are always added in
the same order. Layout: bitsandbytes functional.py (quantize_4bit).
"""

from __future__ import annotations

from typing import Any

import torch

from quantpress.kernels.launch import Launch, Problem, check_device
from quantpress.kernels.nf4.any_shape import _any, nf4_any
from quantpress.kernels.nf4.gemv import WIDEST, nf4_gemv
from quantpress.kernels.nf4.tiled import nf4_dense, nf4_tiled

__all__ = [
    "BLOCKSIZES", "check_input", "check_nf4", "nf4_dequantize", "nf4_launch", "nf4_matmul", "reference_nf4_dequantize",
]  # fmt: skip

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_PROCESSORS = 132  # of an H100 or H200
_TILED_ROWS = 256  # input rows above which a matrix that is dequantized once is multiplied by cuBLAS


def reference_nf4_dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, rows: int, columns: int, blocksize: int,
    dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gives rows [start, stop) as a dense (n, K) matrix in plain torch.

    The product of level and absmax is computed in float64 for float64, else in float32, and rounded to `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stop = rows if stop is None else min(stop, rows)
    place = torch.arange(start * columns, stop * columns, device=packed.device)
    codes = (packed[place // 2] >> (4 * (1 - place % 2)).to(torch.uint8)) & 15
    values = levels.to(wide)[codes.to(torch.int64)] * absmax.to(wide)[place // blocksize]
    return values.to(dtype).view(stop - start, columns)


def check_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, rows: int, columns: int, blocksize: int
) -> None:
    """Checks that the parts of a matrix fit each other; reads no values.

    Raises:
        ValueError: something does not fit.
    """
    if rows < 0 or columns < 1 or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"{rows} rows, {columns} columns in blocks of {blocksize}: blocks have 32, 64, ... 4096 values"
        )
    size = rows * columns
    wanted: list[tuple[str, torch.Tensor, torch.dtype, tuple[int, ...]]] = [
        ("packed", packed, torch.uint8, ((size + 1) // 2,)),
        ("absmax", absmax, torch.float32, (-(-size // blocksize),)),
        ("levels", levels, torch.float32, (16,)),
    ]
    for name, tensor, dtype, shape in wanted:
        found: tuple[Any, ...] = (tensor.dtype, tuple(tensor.shape), tensor.device)
        if found != (dtype, shape, packed.device):
            raise ValueError(f"{name} is {found}, wanted {(dtype, shape, packed.device)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has gaps between its elements")


def nf4_dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, rows: int, columns: int, blocksize: int,
    dtype: torch.dtype, *, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gives the dense matrix: `level * absmax` in float32, rounded once to `dtype`.

    Args:
        packed: (ceil(N * K / 2),) uint8, two codes each.
        absmax: (ceil(N * K / blocksize),) float32.
        levels: (16,) float32.
        rows: N.
        columns: K.
        blocksize: values that share an absmax: 32, 64, ... 4096.
        dtype: float16, bfloat16 or float32.
        out: (N, K) of that type to fill.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    check_nf4(packed, absmax, levels, rows, columns, blocksize)
    check_device(_any, packed)
    out = _output(out, (rows, columns), dtype, packed.device)
    if out.numel():
        nf4_dense(packed, absmax, levels, blocksize, out)
    return out


def nf4_matmul(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, rows: int, columns: int,
    blocksize: int, bias: torch.Tensor | None = None, *, launch: Launch | None = None, deterministic: bool = True,
    rounding: torch.dtype | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Multiplies input rows with the matrix: x @ W.T + bias.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous.
        packed: (ceil(N * K / 2),) uint8, two codes each.
        absmax: (ceil(N * K / blocksize),) float32.
        levels: (16,) float32.
        rows: N.
        columns: K; where it is no multiple of 32 a plain kernel is used, whatever the launch says.
        blocksize: values that share an absmax: 32, 64, ... 4096.
        bias: (N,) of x's type.
        launch: "gemv" for up to four input rows, "tiled", or "dense", which for float32 is tiled too, so that nothing
            is multiplied in TF32; by default `nf4_launch`.
        deterministic: nothing else is implemented: shared sums are always added in one order.
        rounding: float16 or bfloat16: weights are rounded to it whatever the type of x is, as where a checkpoint says
            what its weights were dequantized to; None: see the module.
        out: (M, N) of x's type to fill.

    Returns:
        (M, N) of x's type.

    Raises:
        ValueError: shapes, types or devices that do not fit, or a launch that cannot be.
    """
    del deterministic
    check_nf4(packed, absmax, levels, rows, columns, blocksize)
    check_input(x, bias, rows, columns, rounding)
    check_device(_any, x, packed, bias)
    out = _output(out, (len(x), rows), x.dtype, x.device)
    if not out.numel():
        return out
    chosen = launch or nf4_launch(_problem(x, rows, blocksize))
    if chosen.kernel == "dense" and x.dtype != torch.float32:
        dense = nf4_dequantize(packed, absmax, levels, rows, columns, blocksize, rounding or x.dtype).to(x.dtype)
        if bias is None:
            return torch.mm(x, dense.T, out=out)
        return torch.addmm(bias, x, dense.T, out=out)
    kept = None if rounding is None else str(rounding).removeprefix("torch.")
    # rows begin in the middle of words, or words are not where the device can read them
    if columns % 32 or packed.data_ptr() % 16:
        nf4_any(x, packed, absmax, levels, bias, out, blocksize, kept)
    elif chosen.kernel == "gemv":
        if len(x) > WIDEST:
            raise ValueError(f"{len(x)} input rows: gemv takes up to {WIDEST}")
        nf4_gemv(x, packed, absmax, levels, bias, out, blocksize, kept, chosen)
    else:
        nf4_tiled(x, packed, absmax, levels, bias, out, blocksize, kept, chosen)
    return out


def nf4_launch(problem: Problem) -> Launch:
    """Chooses a launch by arithmetic, for 132 multiprocessors; nothing of it was timed on hardware yet.

    A vector kernel wants 16 warps on each multiprocessor, 4 KiB of loads in flight each: it takes as few threads along
    K as that needs, then fewer outputs per program, then several programs along K. Tiles want two programs on each
    multiprocessor and share the sums along K until there are so many.
    """
    if problem.rows_in <= WIDEST:
        return _gemv_launch(problem)
    if problem.rows_in > _TILED_ROWS and problem.dtype != "float32":
        return Launch("dense")
    wide = problem.dtype == "float32"
    block_m = 16 if problem.rows_in <= 16 else 32 if problem.rows_in <= 32 else 64
    block_n, block_k = (32, 32) if wide else (64, 64)
    blocks = -(-problem.rows_in // block_m) * -(-problem.rows // block_n)
    most = max(problem.columns // (4 * block_k), 1)
    splits = 1
    while blocks * splits < 2 * _PROCESSORS and 2 * splits <= min(most, 16):
        splits *= 2
    return Launch("tiled", block_m, block_n, block_k, splits, 4, 3)


def _gemv_launch(problem: Problem) -> Launch:
    wanted, steps = 16 * _PROCESSORS, -(-problem.columns // 1024)  # 32 threads take 1024 columns in a step
    warps, block_n, splits = 1, 8, 1
    while warps < 4 and warps * 2 <= steps and -(-problem.rows // block_n) * warps < wanted:
        warps *= 2
    while block_n > 2 and -(-problem.rows // block_n) * warps < wanted // 2:
        block_n //= 2
    while splits * 2 * warps <= steps and -(-problem.rows // block_n) * warps * splits < wanted // 2:
        splits *= 2
    return Launch("gemv", block_n=block_n, block_k=1024 * warps, split_k=splits, warps=warps, stages=1)


def _problem(x: torch.Tensor, rows: int, blocksize: int) -> Problem:
    dtype = str(x.dtype).removeprefix("torch.")
    return Problem(len(x), rows, x.shape[1], 4, blocksize, dtype, symmetric=True, kind="nf4")


def check_input(
    x: torch.Tensor, bias: torch.Tensor | None, rows: int, columns: int, rounding: torch.dtype | None
) -> None:
    """Checks what a matrix is multiplied with, and the type that its weights are rounded to.

    Raises:
        ValueError: something does not fit.
    """
    if x.dtype not in _TYPES or x.dim() != 2 or x.shape[1] != columns or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, wanted (M, {columns}) float16, bfloat16 or float32, contiguous"
        )
    if bias is not None and (bias.dtype, tuple(bias.shape), bias.device) != (x.dtype, (rows,), x.device):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}, wanted {x.dtype} of {(rows,)}"
        )
    if rounding not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"rounding to {rounding}: wanted float16, bfloat16 or None")


def _output(out: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype not in _TYPES:
        raise ValueError(f"a result of {dtype}: wanted float16, bfloat16 or float32")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    found: tuple[Any, ...] = (out.dtype, tuple(out.shape), out.device)
    if found != (dtype, shape, device) or not out.is_contiguous():
        raise ValueError(f"out is {found}, wanted {(dtype, shape, device)} without gaps")
    return out
