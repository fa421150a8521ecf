"""Up to four input rows times a matrix in bitsandbytes' 4-bit levels: each thread reads 32 neighbouring codes of a row.

A program takes `block_n` outputs; its threads lie along K, which is what is contiguous, 16 bytes of codes each. The 32
values of a thread share one absmax (blocks have 32 values or more and begin where 32 values begin), so it multiplies
the sum of 32 products, and nothing is rounded to less than float32. Inputs are read once for all outputs.

A level is looked up in a table of 16 float32 by a shuffle between the threads of a warp, or with several warps from
shared memory, whose 16 entries lie in different banks. Either goes through the load and store unit, which takes 32
lanes per clock: that is what bounds the kernel, at about 26 weights per clock and multiprocessor with the loads beside
them, where 16.5 bytes per clock of memory bring 29 (0.5625 bytes per weight in blocks of 64). K is a constant of the
build: distances between the rows of a tile become immediate operands, and addresses cost next to nothing. Compiled for
sm_90 (8 outputs, one warp, one input row) the loop takes 4.4 instructions per weight with Triton 3.6 and 4.3 with 3.9,
of which a shift, a mask, the lookup and the multiply-add are 4; 80 and 96 registers, so 25 and 21 warps and 110 KiB of
loads in flight on a multiprocessor. These are figures of the compiler and arithmetic; not timed on hardware yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantpress.kernels.launch import Launch
from quantpress.kernels.nf4.levels import levels_of_words, rounded
from quantpress.kernels.slabs import sum_slabs, workspace

__all__ = ["WIDEST", "nf4_gemv"]

WIDEST = 4  # input rows; each takes a register per output and thread
_LANE = 32  # values of a row that a thread takes at a time


def nf4_gemv(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, blocksize: int, rounding: str | None, launch: Launch,
) -> None:  # fmt: skip
    """Fills `out` (M, N); what is given fits each other and K is a multiple of 32 (`nf4_matmul` checks it).

    Args:
        x: (M, K), M from 1 to 4.
        packed: (N * K / 2,) uint8, aligned to 16 bytes.
        absmax: float32, one for each block.
        levels: (16,) float32.
        bias: (N,) of x's type, or None.
        out: (M, N) of x's type.
        blocksize: values that share an absmax.
        rounding: "float16" or "bfloat16", to which weights are rounded; None: they are not.
        launch: `block_n` outputs of a program (1, 2, 4 or 8), `warps` along K, `split_k`.
    """
    (rows_in, columns), rows = x.shape, out.shape[1]
    blocks = triton.cdiv(rows, launch.block_n)
    slabs, arrived = workspace(x.device, launch.split_k, rows_in, rows, blocks)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _gemv[(blocks, launch.split_k)](
            x, packed.view(torch.int32), absmax, levels, bias, out, slabs, arrived, rows_in, rows, rows_in * rows,
            columns, blocksize, rounding, launch.split_k, triton.next_power_of_2(rows_in), launch.block_n,
            32 * launch.warps, num_warps=launch.warps, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _eight(values):  # type: ignore[no-untyped-def]
    """Splits (a, b, 2, 2, 2) into eight (a, b), the last of all the slowest."""
    even, odd = tl.split(values)
    zero_four, two_six = tl.split(even)
    one_five, three_seven = tl.split(odd)
    v0, v4 = tl.split(zero_four)
    v2, v6 = tl.split(two_six)
    v1, v5 = tl.split(one_five)
    v3, v7 = tl.split(three_seven)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit  # type: ignore[untyped-decorator]
def _scales(  # type: ignore[no-untyped-def]
    absmax, row, rows, quad, columns: tl.constexpr, blocksize: tl.constexpr
):
    """The absmax (block_q,) of the quads of a row."""
    quads_of_block: tl.constexpr = blocksize // 32
    if columns % blocksize == 0:
        place = row * (columns // blocksize) + quad // quads_of_block
    else:
        place = (row * (columns // 32) + quad) // quads_of_block
    return tl.load(absmax + place, mask=quad < tl.where(row < rows, columns // 32, 0), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of_scales(  # type: ignore[no-untyped-def]
    absmax, row, rows, quad, columns: tl.constexpr, blocksize: tl.constexpr, count: tl.constexpr
):
    """The absmax (count, block_q) of `count` rows from `row` (int64) on.

    Loaded row by row: a tile of pointers has no neighbours in either direction, and compilers differ in how they lay
    out such a tile.
    """
    tile = _scales(absmax, row, rows, quad, columns, blocksize)
    if count > 1:
        tile = tl.join(tile, _scales(absmax, row + count // 2, rows, quad, columns, blocksize))
    if count > 2:
        one = _scales(absmax, row + count // 4, rows, quad, columns, blocksize)
        tile = tl.join(tile, tl.join(one, _scales(absmax, row + 3 * (count // 4), rows, quad, columns, blocksize)))
    if count > 4:
        one = _scales(absmax, row + 1, rows, quad, columns, blocksize)
        three = _scales(absmax, row + 3, rows, quad, columns, blocksize)
        odd = tl.join(one, _scales(absmax, row + 5, rows, quad, columns, blocksize))
        odd = tl.join(odd, tl.join(three, _scales(absmax, row + 7, rows, quad, columns, blocksize)))
        tile = tl.join(tile, odd)
    return tl.trans(tile.reshape(quad.shape[0], count))


@triton.jit  # type: ignore[untyped-decorator]
def _line(x, line, place, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = place < columns
    return tl.load(x + line * columns + place, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _inputs(x, rows_in, place, columns: tl.constexpr, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inputs (count, block_q, 2, 2, 2) float32 at the places (block_q, 8) of each input row."""
    first = _line(x, 0, place, columns)
    if count == 1:
        tile = first[None, :, :]
    else:
        one = _line(x, 1, place, columns)
        if count == 2:
            tile = tl.permute(tl.join(first, one), (2, 0, 1))
        else:
            two = _line(x, 2, place, columns)
            three = _line(x, rows_in - 1, place, columns)  # of three rows the last one again
            both = tl.join(tl.join(first, two), tl.join(one, three))
            tile = tl.permute(both.reshape(place.shape[0], 8, 4), (2, 0, 1))
    return tile.reshape(count, place.shape[0], 2, 2, 2)


@triton.jit  # type: ignore[untyped-decorator]
def _gemv(  # type: ignore[no-untyped-def]
    x, words, absmax, levels, bias, out, slabs, arrived, rows_in, rows, slab_size, columns: tl.constexpr,
    blocksize: tl.constexpr, rounding: tl.constexpr, splits: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, block_q: tl.constexpr,
):  # fmt: skip
    # a quad is the 32 values of 16 bytes
    quads: tl.constexpr = columns // 32
    each: tl.constexpr = (quads + splits * block_q - 1) // (splits * block_q) * block_q
    split = tl.program_id(1)
    first_row = tl.program_id(0).to(tl.int64) * block_n
    row, line = first_row + tl.arange(0, block_n), tl.arange(0, block_m)
    table = tl.load(levels + tl.arange(0, 16))
    sums = tl.zeros((block_m, block_n, block_q), tl.float32)
    for step in range(0, each, block_q):
        start = split * each + step
        quad, word = start + tl.arange(0, block_q), start * 4 + tl.arange(0, block_q * 4)
        codes = tl.load(
            words + (row[:, None] * (quads * 4) + word[None, :]), other=0, eviction_policy="evict_first",
            mask=(row < rows)[:, None] & (word < quads * 4)[None, :],
        ).to(tl.uint32, bitcast=True)  # fmt: skip
        scale = _tile_of_scales(absmax, first_row, rows, quad, columns, blocksize, block_n)
        even, odd = tl.split(codes.reshape(block_n, block_q, 2, 2))
        word0, word2 = tl.split(even)
        word1, word3 = tl.split(odd)
        part = tl.zeros((block_m, block_n, block_q), tl.float32)
        for number in tl.static_range(4):
            word = word0 if number == 0 else word1 if number == 1 else word2 if number == 2 else word3
            place = quad[:, None] * 32 + (number * 8 + tl.arange(0, 8))[None, :]
            inputs = _inputs(x, rows_in, place, columns, block_m)
            values = levels_of_words(word, table, block_n, block_q)
            if rounding is not None:
                values = rounded(values * scale[:, :, None, None, None], rounding)
            x0, x1, x2, x3, x4, x5, x6, x7 = _eight(inputs)
            v0, v1, v2, v3, v4, v5, v6, v7 = _eight(values)
            part += x0[:, None, :] * v0[None, :, :]
            part += x1[:, None, :] * v1[None, :, :]
            part += x2[:, None, :] * v2[None, :, :]
            part += x3[:, None, :] * v3[None, :, :]
            part += x4[:, None, :] * v4[None, :, :]
            part += x5[:, None, :] * v5[None, :, :]
            part += x6[:, None, :] * v6[None, :, :]
            part += x7[:, None, :] * v7[None, :, :]
        if rounding is None:
            part *= scale[None, :, :]
        sums += part
    result = tl.sum(sums, axis=2)
    place = line[:, None].to(tl.int64) * rows + row[None, :]
    inside = (line < rows_in)[:, None] & (row < rows)[None, :]
    result, last = sum_slabs(result, slabs, arrived, tl.program_id(0), split, place, inside, slab_size, splits)
    if last:
        if bias is not None:
            result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
