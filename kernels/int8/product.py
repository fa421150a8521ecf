"""Products of int8 codes on tensor cores: sums in int32, scaled at the end.

Sums of whole numbers are exact in any order, the rest is rounded in float32 in a fixed order and multiply-adds are not
fused, so the result is that of the plain torch in plain.py bit for bit, whatever the launch parameters are.

The weight is (N, K) as checkpoints store it. Both operands are contiguous along K, which is how tensor cores want int8,
so tiles go from memory to shared memory by asynchronous copies of 16 bytes and on without being touched. Rows and
outputs past the end are not masked but clamped to the last one and not stored; columns are masked only where K is no
multiple of a tile. Few rows are padded to 16. Where blocks of outputs are fewer than the GPU can hold, programs share
the columns of a block: each writes its sums, and the last to arrive adds them up.

Figures of the compiler for sm_90: with one row the loop takes 58 instructions for 2048 weights of a warp, 0.9 of a
lane for each weight, where 7.7 would still keep up with memory; 56 registers and 30 KB let seven programs of four warps
stay on a multiprocessor, each with 24 KB under way. Tiles of 128 x 256 sums run on warp-group products and keep 185
registers. The kernel has run in Triton's interpreter and was compiled for sm_80 and sm_90 (Triton 3.6 and 3.9); it has
not been run or timed on hardware yet.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from quantpress.kernels.int8.plain import LONGEST
from quantpress.kernels.launch import Launch, Problem, check_device, processors
from quantpress.kernels.slabs import sum_slabs
from quantpress.kernels.workspace import counters

__all__ = ["int8_launch", "int8_product"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BAND = 8  # blocks of rows that are worked on together, so that they find the weight's tile in the L2 cache


def int8_launch(problem: Problem, count: int = 132, capability: int = 9) -> Launch:
    """Gives sensible launch parameters for a product of int8 codes, by arithmetic; nothing of it is measured.

    Per multiprocessor of an H200 and clock: 4096 multiply-adds, about 48 bytes from the L2 cache, and 16 from memory
    where 24 KB are under way. Chosen is what makes the multiprocessor with the most programs finish first.

    Args:
        problem: M, N and K; the other fields are of no matter.
        count: multiprocessors of the device.
        capability: major, of the device. Before 9 sums of 128 x 256 do not fit the registers of 8 warps.
    """
    best, least = Launch("tiled"), float("inf")
    for tile in _tiles(problem.rows_in):
        if capability < 9 and tile.block_n > 128:
            continue
        steps = triton.cdiv(problem.columns, tile.block_k)
        for split in (1, 2, 4, 8, 16):
            if split > 1 and steps < 4 * split:
                break
            cost = _clocks(problem, tile, split, count)
            if cost < 0.97 * least:
                best, least = replace(tile, split_k=split), cost
    return best


def _clocks(problem: Problem, tile: Launch, split: int, count: int) -> float:
    blocks = triton.cdiv(problem.rows_in, tile.block_m) * triton.cdiv(problem.rows, tile.block_n)
    programs = triton.cdiv(blocks * split, count)  # of the busiest multiprocessor
    steps = triton.cdiv(triton.cdiv(problem.columns, tile.block_k), split)
    size = (tile.block_m + tile.block_n) * tile.block_k
    at_once = min(programs, max(200_000 // (tile.stages * size), 1))
    underway = at_once * (tile.stages - 1) * tile.block_n * tile.block_k
    memory = problem.rows * problem.columns / (16 * count * min(underway / 24576, 1.0))
    # a program waits for its first tile; of those that share sums each writes them, and the last one reads them all
    ends = programs / at_once * (1500 if split == 1 else 2500)
    if split > 1:
        ends += (1 + split) * min(tile.block_m, problem.rows_in) * tile.block_n * 4 / 48
    products = tile.block_m * tile.block_n * tile.block_k / 4096
    busy = programs * steps * max(products, size / 48)
    whole = programs * steps * tile.block_n * tile.block_k / (16 * min(underway / 24576, 1.0))
    clocks: float = ends + max(memory, busy, whole if problem.rows_in <= tile.block_m else 0.0)
    return clocks


def _tiles(rows_in: int) -> list[Launch]:
    if rows_in <= 64:
        # a multiprocessor needs about 20 KB under way to keep memory busy: three stages of 8 KB in each of its programs
        few = 16 if rows_in <= 16 else 32 if rows_in <= 32 else 64
        return [Launch("tiled", few, width, 128, 1, 4, 4) for width in (64, 32, 128)]
    return [
        Launch("tiled", 128, 256, 128, 1, 8, 3),
        Launch("tiled", 128, 128, 128, 1, 8, 3),
        Launch("tiled", 64, 128, 128, 1, 4, 4),
    ]


def int8_product(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype, kept: tuple[torch.Tensor, torch.Tensor] | None,
    launch: Launch | None, out: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Does what `int8.int8_matmul` does; columns in `kept` are multiplied as they are and added to it.

    Args:
        codes: see `int8.int8_matmul`, as for all that is not described here.
        token_scale: of the codes.
        weight: codes.
        scale: of the weight.
        bias: or None.
        dtype: of the result.
        kept: the inputs (M, K) of `dtype` and (1 + K,) int32: a number of columns, then these columns. Or None.
        launch: or None.
        out: or None.

    Returns:
        (M, N) of `dtype`.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    x, columns_kept = (None, None) if kept is None else kept
    check_device(_multiply, codes, token_scale, weight, scale, bias, x, columns_kept, out)
    (rows_in, columns), rows = _sizes(codes, token_scale, weight, scale, bias, dtype, out)
    result = torch.empty((rows_in, rows), dtype=dtype, device=codes.device) if out is None else out
    if not rows_in or not rows:
        return result
    if launch is None:
        problem = Problem(rows_in, rows, columns, 8, columns, str(dtype).removeprefix("torch."), kind="w8a8")
        capability = torch.cuda.get_device_capability(codes.device)[0] if codes.is_cuda else 9
        launch = int8_launch(problem, processors(codes.device), capability)
    steps = triton.cdiv(columns, launch.block_k)
    share = triton.cdiv(steps, launch.split_k)
    split = triton.cdiv(steps, share)  # no program is left without a tile
    blocks = triton.cdiv(rows_in, launch.block_m) * triton.cdiv(rows, launch.block_n)
    partial = arrived = None
    if split > 1:
        partial = torch.empty((split, rows_in, rows), dtype=torch.int32, device=codes.device)
        arrived = counters(codes.device, blocks)
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        _multiply[(blocks, split)](
            codes, token_scale, weight, scale, bias, result, partial, arrived, x, columns_kept, rows_in, rows, columns,
            share * launch.block_k, rows_in * rows, launch.block_m, launch.block_n, launch.block_k,
            columns % launch.block_k == 0, split, _BAND, num_warps=launch.warps, num_stages=launch.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return result


def _sizes(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype, out: torch.Tensor | None,
) -> tuple[tuple[int, int], int]:  # fmt: skip
    """Checks shapes and types; gives (M, K) and N."""
    if codes.dim() != 2 or weight.dim() != 2 or codes.shape[1] != weight.shape[1]:
        raise ValueError(f"codes {tuple(codes.shape)} and weight {tuple(weight.shape)}: wanted (M, K) and (N, K)")
    (rows_in, columns), rows = codes.shape, len(weight)
    if not 1 <= columns <= LONGEST:
        raise ValueError(f"{columns} columns: wanted 1 to {LONGEST}, whose products an int32 can sum")
    wanted: list[tuple[str, torch.Tensor | None, tuple[torch.dtype, ...], tuple[int, ...]]] = [
        ("codes", codes, (torch.int8,), (rows_in, columns)),
        ("token_scale", token_scale, (torch.float32,), (rows_in,)),
        ("weight", weight, (torch.int8,), (rows, columns)),
        ("scale", scale, _FLOATS, (rows,)),
        ("bias", bias, _FLOATS, (rows,)),
        ("out", out, (dtype,), (rows_in, rows)),
    ]
    for name, tensor, dtypes, shape in wanted:
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or tensor.shape != shape or dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted {dtypes} {shape} for {dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has gaps between its elements")
    return (rows_in, columns), rows


@triton.jit
def _add_kept(values, inputs, weights, kept):  # type: ignore[no-untyped-def]
    """Adds the products of the columns in `kept`, with the codes as they are: a 16-bit float holds each exactly."""
    count = tl.load(kept)
    if inputs.dtype.element_ty == tl.float32:
        # column by column: operands of a product without tensor cores would not fit the registers of the widest tiles
        for number in range(count):
            column = tl.load(kept + 1 + number)
            a, b = tl.load(inputs + column), tl.load(weights + column).to(tl.float32)
            values += a[:, None] * b[None, :]
    else:
        place = tl.arange(0, 16)
        for start in range(0, count, 16):
            inside = start + place < count
            column = tl.load(kept + 1 + start + place, mask=inside, other=0)
            a = tl.load(inputs[:, None] + column[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(weights[None, :] + column[:, None], mask=inside[:, None], other=0)
            values = tl.dot(a, b.to(a.dtype), values)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    codes, token_scale, weight, scale, bias, result, partial, arrived, x, kept, rows_in, rows, columns, share, slab,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, even: tl.constexpr, split: tl.constexpr,
    band: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    down, across = tl.cdiv(rows_in, block_m), tl.cdiv(rows, block_n)
    first = block // (band * across) * band
    height = tl.minimum(down - first, band)
    place_m = (first + block % (band * across) % height) * block_m + tl.arange(0, block_m)
    place_n = (block % (band * across) // height) * block_n + tl.arange(0, block_n)
    # past the end: the last row once more, which is not stored
    row_m, row_n = tl.minimum(place_m, rows_in - 1).to(tl.int64), tl.minimum(place_n, rows - 1).to(tl.int64)
    place = tl.arange(0, block_k)
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, columns)
    left = codes + row_m[:, None] * columns + (low + place)[None, :]
    right = weight + row_n[None, :] * columns + (low + place)[:, None]
    sums = tl.zeros((block_m, block_n), tl.int32)
    for start in range(low, high, block_k):
        if even:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = start + place < columns
            a = tl.load(left, mask=inside[None, :], other=0)
            b = tl.load(right, mask=inside[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += block_k
        right += block_k
    stored = (place_m < rows_in)[:, None] & (place_n < rows)[None, :]
    offset = place_m.to(tl.int64)[:, None] * rows + place_n[None, :]
    sums, last = sum_slabs(sums, partial, arrived, block, tl.program_id(1), offset, stored, slab, split)
    if last:
        values = sums.to(tl.float32) * tl.load(token_scale + row_m)[:, None]
        if kept is not None:
            values = _add_kept(values, x + row_m * columns, weight + row_n * columns, kept)
        values *= tl.load(scale + row_n).to(tl.float32)[None, :]
        if bias is not None:
            values += tl.load(bias + row_n).to(tl.float32)[None, :]
        tl.store(result + offset, values.to(result.dtype.element_ty), mask=stored)
