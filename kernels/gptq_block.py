"""GPTQ's inner loop on a GPU: all columns of a block in one launch, a tile of rows on chip per program.

Rows do not see each other, so no program waits for another. Per column a program picks the column out of its tile,
chooses the code, and takes the error times a row of the factor off the columns that follow; nothing but that row and
the column's scales is read meanwhile. The tile of weights turns into the tile of errors, which is written once.

Every operation is rounded as IEEE float32 says and in the order of the reference: multiply-adds are not fused
(`enable_fp_fusion=False`) and quotients are correctly rounded (`div_rn`; Triton's `/` is not). A kernel compiled so
gives the reference's bits, whatever its tile is.

Launch parameters: one warp per program, because then the only exchange between threads, picking the column, needs
shuffles and no barrier. 256 weights per program, 8 for each thread: two rows of a block of 128 columns, whose chains of
dependent operations hide each other's latency. Compiled for sm_90 that takes 72 registers and no stack, so 28 programs
fit a multiprocessor, and a matrix of 7000 rows is in flight at once on 132 of them; 512 weights take about 100
registers, for a few more rows in flight by fewer warps. These are figures of the compiler and arithmetic. The kernel
has run in Triton's interpreter and was compiled for sm_80 and sm_90 (Triton 3.6 and 3.9); it has not been run or timed
on hardware yet.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["quantize_block", "reference_quantize_block"]

_TILE = 256  # weights of a program; the module's docstring says why
_WIDEST = 1024  # columns of a block: 32 weights, errors and codes for each thread, all that 255 registers take
_LAUNCH: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}


def reference_quantize_block(
    work: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, groups: torch.Tensor,
    codes: torch.Tensor, order: torch.Tensor, errors: torch.Tensor, losses: torch.Tensor, top: int,
) -> None:  # fmt: skip
    """Does what `quantize_block` does, with the same roundings, one column after the other in plain torch."""
    values, loss = work.clone(), torch.zeros_like(losses)
    for column in range(upper.shape[0]):
        value, step = values[:, column], scale[:, groups[column]]
        middle = zero[:, groups[column]].float()
        code = torch.where(step == 0, middle, torch.round(value / step) + middle).clamp(0, top)
        error = (value - step * (code - middle)) / upper[column, column]
        codes[:, order[column]] = code.to(torch.uint8)
        errors[:, column] = error
        loss += error.double().square()
        values[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    losses += loss


def quantize_block(
    work: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, groups: torch.Tensor,
    codes: torch.Tensor, order: torch.Tensor, errors: torch.Tensor, losses: torch.Tensor, top: int,
) -> None:  # fmt: skip
    """Quantizes a block of columns and passes each error on to the columns of the block that follow.

    All tensors are on one device; rows may be strided, the elements of a row may not.

    Args:
        work: (N, B) float32, the weights in visiting order; not changed.
        upper: (B, B) float32, diagonal block of U with H^-1 = U^T U.
        scale: (N, G) float32; 0 for a group whose every code is the zero.
        zero: (N, G) uint8.
        groups: (B,) int64, group of each column, in any order, below G.
        codes: (N, K) uint8; columns `order` are filled.
        order: (B,) int64, the column that each of the block's columns is, below K.
        errors: (N, >= B) float32; the first B columns are filled with error / diagonal, for
            `rest -= errors @ U[block, rest]`. Other memory than `work`.
        losses: (N,) float64; the squared errors are added.
        top: greatest code, 2^bits - 1.

    Raises:
        ValueError: shapes, types or devices that do not fit, or more than 1024 columns.
    """
    _check(work, upper, scale, zero, groups, codes, order, errors, losses)
    rows, count = work.shape
    if not rows or not count:
        return
    columns = triton.next_power_of_2(count)
    tile = max(_TILE // columns, 1)
    with torch.cuda.device_of(work):  # type: ignore[no-untyped-call]
        _column_loop[(triton.cdiv(rows, tile),)](
            work, upper, scale, zero, groups, codes, order, errors, losses, rows, count, float(top), work.stride(0),
            upper.stride(0), scale.stride(0), zero.stride(0), codes.stride(0), errors.stride(0), tile, columns,
            **_LAUNCH,
        )  # fmt: skip


def _check(
    work: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, groups: torch.Tensor,
    codes: torch.Tensor, order: torch.Tensor, errors: torch.Tensor, losses: torch.Tensor,
) -> None:  # fmt: skip
    rows, count = work.shape
    if count > _WIDEST:
        raise ValueError(f"a block of {count} columns: at most {_WIDEST} fit a program")
    wanted: list[tuple[str, torch.Tensor, torch.dtype, tuple[int, ...]]] = [
        ("work", work, torch.float32, (rows, count)),
        ("upper", upper, torch.float32, (count, count)),
        ("scale", scale, torch.float32, (rows, scale.shape[-1])),
        ("zero", zero, torch.uint8, tuple(scale.shape)),
        ("groups", groups, torch.int64, (count,)),
        ("codes", codes, torch.uint8, (rows, codes.shape[-1])),
        ("order", order, torch.int64, (count,)),
        ("errors", errors, torch.float32, (rows, max(errors.shape[-1], count))),
        ("losses", losses, torch.float64, (rows,)),
    ]
    for name, tensor, dtype, shape in wanted:
        found: tuple[Any, ...] = (tensor.dtype, tuple(tensor.shape), tensor.device)
        if found != (dtype, shape, work.device):
            raise ValueError(f"{name} is {found}, wanted {(dtype, shape, work.device)}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has gaps between the elements of a row")
    if work.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"the kernel runs on CUDA devices, the tensors are on {work.device}")


@triton.jit  # type: ignore[untyped-decorator]
def _column_loop(  # type: ignore[no-untyped-def]
    work, upper, scale, zero, groups, codes, order, errors, losses, rows, count, top, work_stride, upper_stride,
    scale_stride, zero_stride, codes_stride, errors_stride, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    place = tl.arange(0, tile_columns)
    inside = row < rows
    held = inside[:, None] & (place < count)[None, :]
    # weights of columns to come, errors of columns that are done
    values = tl.load(work + row[:, None] * work_stride + place[None, :], mask=held, other=0.0)
    chosen = tl.zeros((tile_rows, tile_columns), tl.float32)
    loss = tl.zeros((tile_rows,), tl.float64)
    # a constant number of steps (Triton 3.6 cannot interpret others under numpy 2.4); columns that do not exist hold 0,
    # whose code is the zero and whose error is 0
    for column in range(tile_columns):
        here = (place == column)[None, :]
        value = tl.sum(tl.where(here, values, 0.0), axis=1)
        group = tl.load(groups + column, mask=column < count, other=0)
        step = tl.load(scale + row * scale_stride + group, mask=inside, other=1.0)
        middle = tl.load(zero + row * zero_stride + group, mask=inside, other=0).to(tl.float32)
        # adding and taking off 1.5 * 2^23 rounds to a whole number, ties to even, as long as |steps| < 2^22; what is
        # farther out stays so far out that it is clamped to the end that its rounded self is clamped to
        steps = tl.div_rn(value, tl.where(step == 0.0, 1.0, step))
        code = tl.minimum(tl.maximum((steps + 12582912.0) - 12582912.0 + middle, 0.0), top)
        code = tl.where(step == 0.0, middle, code)
        pivot = tl.load(upper + column * upper_stride + column, mask=column < count, other=1.0)
        error = tl.div_rn(value - step * (code - middle), pivot)
        loss += error.to(tl.float64) * error.to(tl.float64)
        following = (place > column) & (place < count)
        factor = tl.load(upper + column * upper_stride + place, mask=following, other=0.0)
        values = tl.where(following[None, :], values - error[:, None] * factor[None, :], values)
        values = tl.where(here, error[:, None], values)
        chosen = tl.where(here, code[:, None], chosen)
    target = tl.load(order + place, mask=place < count, other=0)
    tl.store(codes + row[:, None] * codes_stride + target[None, :], chosen.to(tl.uint8), mask=held)
    tl.store(errors + row[:, None] * errors_stride + place[None, :], values, mask=held)
    tl.store(losses + row, tl.load(losses + row, mask=inside, other=0.0) + loss, mask=inside)
