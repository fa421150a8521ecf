"""W8A8 on a GPU: inputs rounded to int8 token by token, and products with weights in int8.

Two launches: `quantize_tokens` reads each row of the input once and writes codes, `int8_matmul` multiplies codes with
codes (see product.py). The results are those of plain.py bit for bit in Triton's interpreter; nothing has
been run or timed on hardware yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quantpress.kernels.int8.plain import HALF_RANGE
from quantpress.kernels.int8.product import int8_launch, int8_product
from quantpress.kernels.launch import Launch, check_device

__all__ = ["check_input", "int8_launch", "int8_matmul", "quantize_tokens", "row_launch", "w8a8"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 16384  # columns that a program keeps on chip: 32 in each of 512 threads


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row to int8 as compressed-tensors does, with the bits of `plain.reference_quantize_tokens`.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous.

    Returns:
        (M, K) int8 and the scales (M,) float32.

    Raises:
        ValueError: shape, type or device that does not fit.
    """
    check_input(_quantize_row, x)
    rows, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if not rows:
        return codes, scale
    block, warps = row_launch(columns)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _quantize_row[(rows,)](
            x, codes, scale, columns, HALF_RANGE, float(torch.finfo(x.dtype).eps), columns <= block, block,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale


def int8_matmul(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float16, *, launch: Launch | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Computes `(codes @ weight.T) * token_scale * scale + bias`; sums in int32, the rest in float32.

    Args:
        codes: (M, K) int8, contiguous; K at most `plain.LONGEST`, so that sums fit.
        token_scale: (M,) float32.
        weight: (N, K) int8, contiguous.
        scale: (N,) float16, bfloat16 or float32.
        bias: (N,) float16, bfloat16 or float32, or None.
        dtype: float16, bfloat16 or float32, of the result.
        launch: `int8_launch`'s where None.
        out: (M, N) of `dtype`, contiguous, to be filled.

    Returns:
        (M, N), `out` if given; the same bits for all launch parameters.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    return int8_product(codes, token_scale, weight, scale, bias, dtype, None, launch, out)


def w8a8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
    *, launch: Launch | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Computes x W^T + bias with int8 weights, inputs rounded to int8 by `quantize_tokens`.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous.
        weight: (N, K) int8, contiguous.
        scale: (N,) float16, bfloat16 or float32; a weight is its code times this.
        bias: (N,) float16, bfloat16 or float32, or None.
        launch: `int8_launch`'s where None.
        out: (M, N) of the type of `x`, contiguous, to be filled.

    Returns:
        (M, N) of the type of `x`.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    codes, token_scale = quantize_tokens(x)
    return int8_product(codes, token_scale, weight, scale, bias, x.dtype, None, launch, out)


def check_input(kernel: Any, x: torch.Tensor) -> None:
    """Checks what is to be rounded: (M, K) of a float type, contiguous, K at least 1, on a device the kernel runs on.

    Raises:
        ValueError: it is not.
    """
    if x.dim() != 2 or x.dtype not in _FLOATS or not x.is_contiguous() or not x.shape[1]:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, wanted contiguous (M, K) of float16, bfloat16 or float32")
    check_device(kernel, x)


def row_launch(columns: int, widest: int = _WIDEST) -> tuple[int, int]:
    """Gives how many columns of a row a program takes at a time, at most `widest`, and its warps."""
    block = min(triton.next_power_of_2(columns), widest)
    return block, min(max(block // 512, 1), 16)


@triton.jit
def _codes(values, step):  # type: ignore[no-untyped-def]
    if values.dtype == tl.float32:
        steps = tl.div_rn(values, step)
    else:
        # A quotient of two numbers of 11 bits is more than 2^-23 of itself away from the middle of two neighbours of 11
        # bits (and 8 bits leave more room), and a product with the reciprocal is off by less: rounded to the type it is
        # the rounded quotient. Small steps are lifted first, or their reciprocal would overflow.
        lift = tl.where(step < 2.0**-60, 2.0**64, 1.0)
        steps = ((values.to(tl.float32) * lift) * tl.div_rn(1.0, step * lift)).to(values.dtype).to(tl.float32)
    inside = tl.minimum(tl.maximum(steps, -128.0), 127.0)
    return ((inside + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23 leaves no bits for a fraction: halves to even


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_row(  # type: ignore[no-untyped-def]
    x, codes, scale, columns, half_range, epsilon, held: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    source, target = x + row * columns, codes + row * columns
    stored: tl.constexpr = x.dtype.element_ty
    values = tl.load(source + place, mask=place < columns, other=0.0)
    wide = values.to(tl.float32)
    greatest, bad = tl.abs(wide), wide * 0.0  # what is not finite makes a NaN here
    if not held:
        for start in range(block, columns, block):
            wide = tl.load(source + start + place, mask=start + place < columns, other=0.0).to(tl.float32)
            greatest, bad = tl.maximum(greatest, tl.abs(wide)), bad + wide * 0.0
    # the steps of the type of x: float32 has more than twice its bits, so rounding twice rounds as once
    step = tl.div_rn(tl.max(greatest, axis=0), half_range).to(stored).to(tl.float32)
    step = tl.where(step == 0.0, epsilon, step)
    tl.store(scale + row, step + tl.sum(bad, axis=0))
    if held:
        tl.store(target + place, _codes(values, step), mask=place < columns)
    else:
        for start in range(0, columns, block):
            values = tl.load(source + start + place, mask=start + place < columns, other=0.0)
            tl.store(target + start + place, _codes(values, step), mask=start + place < columns)
