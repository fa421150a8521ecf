"""LLM.int8() on a GPU: columns with an outlier in any row are multiplied as they are, the others in int8.

No step waits for the host. A program per row rounds it, outliers aside, and flags their columns; the last program to
finish gathers the flags into a list of columns, in rising order, and takes the flags back. Where there are several rows
their codes in such columns are cleared in a launch of its own. The product is that of product.py, which adds the
listed columns before the weight's scale is multiplied in, 16 at a time on tensor cores or one by one in float32: their
number is read on the device, and few columns cost little, whatever K is.

bitsandbytes rounds more often (see `plain.reference_llm_int8`, which this follows) and reads the columns back.
Nothing has been run or timed on hardware yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantpress.kernels.int8.plain import OUTLIER
from quantpress.kernels.int8.product import int8_product
from quantpress.kernels.int8.w8a8 import check_input, row_launch
from quantpress.kernels.launch import Launch
from quantpress.kernels.workspace import counters

__all__ = ["llm_int8", "quantize_split"]

_BLOCK = 4096  # columns that a program takes at a time: what more there is of a row it finds in the cache again


def quantize_split(x: torch.Tensor, threshold: float = OUTLIER) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds each row to int8 apart from columns with an outlier, as `plain.reference_quantize_split` does.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous.
        threshold: magnitude of an outlier, in the type of `x`; 0 for none.

    Returns:
        (M, K) int8, 0 in columns with an outlier; absmax / 127 of each row (M,) float32; and (1 + K,) int32: how many
        columns have an outlier, then these columns, rising; what follows is of no matter.

    Raises:
        ValueError: shape, type or device that does not fit.
    """
    check_input(_quantize_row, x)
    rows, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    kept = torch.empty(1 + columns, dtype=torch.int32, device=x.device)
    if not rows:
        return codes, scale, kept.zero_()
    block, warps = row_launch(columns, _BLOCK)
    limit = torch.tensor(threshold if threshold > 0 else torch.inf, dtype=x.dtype).item()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _quantize_row[(rows,)](
            x, codes, scale, kept, counters(x.device, 1 + columns), rows, columns, limit, threshold > 0, block,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
        if rows > 1 and threshold > 0:
            _clear[(triton.cdiv(rows, 64),)](codes, kept, rows, columns, 64, num_warps=4, enable_fp_fusion=False)
    return codes, scale, kept


def llm_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
    *, threshold: float = OUTLIER, launch: Launch | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Computes x W^T + bias as LLM.int8() does, without waiting for the device.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous. All rows are one batch: an outlier in one of them keeps its
            column for all.
        weight: (N, K) int8, contiguous.
        scale: (N,) floating-point; a weight is its code times this. Checkpoints of bitsandbytes store 127 times as
            much, `SCB`.
        bias: (N,) floating-point, or None.
        threshold: magnitude of an outlier; 0 for none.
        launch: see `int8.int8_matmul`.
        out: (M, N) of the type of `x`, contiguous, to be filled.

    Returns:
        (M, N) of the type of `x`.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    codes, token_scale, kept = quantize_split(x, threshold)
    return int8_product(codes, token_scale, weight, scale, bias, x.dtype, (x, kept), launch, out)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_row(  # type: ignore[no-untyped-def]
    x, codes, scale, kept, flags, rows, columns, limit, split: tl.constexpr, block: tl.constexpr
):
    # flags: a counter of rows that are done, then one for each column; all are left 0
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    source, target = x + row * columns, codes + row * columns
    greatest = tl.zeros((block,), tl.float32)
    bad = tl.zeros((block,), tl.float32)
    for start in range(0, columns, block):
        inside = start + place < columns
        wide = tl.load(source + start + place, mask=inside, other=0.0).to(tl.float32)
        if split:
            outlier = tl.abs(wide) >= limit
            tl.store(flags + 1 + start + place, 1, mask=outlier & inside)
            wide = tl.where(outlier, 0.0, wide)
        greatest, bad = tl.maximum(greatest, tl.abs(wide)), bad + wide * 0.0  # what is not finite makes a NaN
    absmax = tl.max(greatest, axis=0)
    factor = tl.div_rn(1.0, tl.where(absmax == 0.0, 1.0, absmax)) * 127.0
    # where it overflows, torch makes zeros of the infinities and NaNs that come of it
    factor = tl.where(factor == float("inf"), 0.0, factor)
    tl.store(scale + row, tl.div_rn(absmax, 127.0) + tl.sum(bad, axis=0))
    for start in range(0, columns, block):
        inside = start + place < columns
        wide = tl.load(source + start + place, mask=inside, other=0.0).to(tl.float32)
        if split:
            wide = tl.where(tl.abs(wide) >= limit, 0.0, wide)
        steps = tl.minimum(tl.maximum(wide * factor, -127.0), 127.0)  # only a NaN or a rounding is outside
        tl.store(target + start + place, ((steps + 12582912.0) - 12582912.0).to(tl.int8), mask=inside)
    if split:
        tl.debug_barrier()
        if tl.atomic_add(flags, 1, sem="acq_rel") == rows - 1:
            tl.store(flags, 0)
            _list_columns(kept, flags + 1, columns, block)
    elif row == 0:
        tl.store(kept, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _list_columns(kept, flags, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, block)
    count = 0
    for start in range(0, columns, block):
        inside = start + place < columns
        found = tl.load(flags + start + place, mask=inside, other=0, cache_modifier=".cg")
        more = tl.sum(found, axis=0)
        if more > 0:
            tl.store(kept + count + tl.cumsum(found, axis=0), start + place, mask=found != 0)
            tl.store(flags + start + place, 0, mask=found != 0)
        count += more
    tl.store(kept, count)


@triton.jit  # type: ignore[untyped-decorator]
def _clear(codes, kept, rows, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    place = tl.arange(0, 16)
    count = tl.load(kept)
    for start in range(0, count, 16):
        column = tl.load(kept + 1 + start + place, mask=start + place < count, other=0)
        stored = (row < rows)[:, None] & (start + place < count)[None, :]
        tl.store(codes + row[:, None] * columns + column[None, :], tl.zeros((block, 16), tl.int8), mask=stored)
