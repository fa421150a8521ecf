"""4-bit levels of bitsandbytes with any number of columns: one code, one absmax, one level at a time.

Rows of a matrix whose columns are no multiple of 32 begin anywhere in a byte and in a block. Real models have none, so
this is plain: sums in float32, weights not rounded, no tensor cores, any number of input rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantpress.kernels.nf4.levels import rounded

__all__ = ["nf4_any"]

_ROWS_IN, _ROWS, _COLUMNS = 4, 8, 64  # of a program


def nf4_any(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, blocksize: int, rounding: str | None,
) -> None:  # fmt: skip
    """Fills `out` (M, N); arguments as in `nf4_gemv`, with any M and K."""
    (rows_in, columns), rows = x.shape, out.shape[1]
    block_m = min(triton.next_power_of_2(rows_in), _ROWS_IN)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _any[(triton.cdiv(rows, _ROWS), triton.cdiv(rows_in, block_m))](
            x, packed, absmax, levels, bias, out, rows_in, rows, columns, blocksize, rounding, block_m, _ROWS,
            _COLUMNS, num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _any(  # type: ignore[no-untyped-def]
    x, packed, absmax, levels, bias, out, rows_in, rows, columns, blocksize: tl.constexpr, rounding: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    line = tl.program_id(1).to(tl.int64) * block_m + tl.arange(0, block_m)
    inside, given = row < rows, line < rows_in
    sums = tl.zeros((block_m, block_n, block_k), tl.float32)
    for start in range(0, columns, block_k):
        column = start + tl.arange(0, block_k)
        held = inside[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        both = tl.load(packed + place // 2, mask=held, other=0).to(tl.int32)
        code = tl.where(place % 2 == 0, both >> 4, both) & 15
        scale = tl.load(absmax + place // blocksize, mask=held, other=0.0)
        weight = rounded(tl.load(levels + code) * scale, rounding)
        inputs = tl.load(
            x + line[:, None] * columns + column[None, :], mask=given[:, None] & (column < columns)[None, :], other=0.0
        )
        sums += inputs.to(tl.float32)[:, None, :] * weight[None, :, :]
    result = tl.sum(sums, axis=2)
    if bias is not None:
        result += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = line[:, None] * rows + row[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=given[:, None] & inside[None, :])
