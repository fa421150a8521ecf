"""Many input rows times a matrix in bitsandbytes' 4-bit levels: tiles on tensor cores, and the dense matrix.

Both round `level * absmax` once to the type of the inputs: these are the values that bitsandbytes dequantizes to, and
that a QLoRA training multiplied with. In a tile a thread reads words of eight codes; the levels come from a table of 16
in shared memory. Words, absmax and inputs of the next tiles are under way meanwhile (cp.async). Compiled for sm_90, a
tile of 16 x 64 x 64 takes 7.2 instructions per weight, of which the lookup, the product with absmax, shift and mask are
4; tiles of 64 input rows use HGMMA, smaller ones HMMA. Not timed on hardware yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantpress.kernels.launch import Launch
from quantpress.kernels.nf4.levels import levels_of_words, rounded
from quantpress.kernels.slabs import sum_slabs, workspace

__all__ = ["nf4_dense", "nf4_tiled"]

_BAND = 8  # blocks of input rows that take the same outputs one after the other: their words stay in the cache
_VALUES = 4096  # values of a program of `nf4_dense`


def nf4_tiled(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, blocksize: int, rounding: str | None, launch: Launch,
) -> None:  # fmt: skip
    """Fills `out` (M, N); arguments as in `nf4_gemv`, with any M.

    Products are rounded to nothing less than float32, in which they are summed; inputs in float32 are multiplied in
    float32. `block_m`, `block_n` and `block_k` of the launch are powers of two from 16 on, block_k from 32.
    """
    (rows_in, columns), rows = x.shape, out.shape[1]
    lines, blocks = triton.cdiv(rows_in, launch.block_m), triton.cdiv(rows, launch.block_n)
    slabs, arrived = workspace(x.device, launch.split_k, rows_in, rows, lines * blocks)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _tiled[(lines * blocks, launch.split_k)](
            x, packed.view(torch.int32), absmax, levels, bias, out, slabs, arrived, rows_in, rows, rows_in * rows,
            columns // 32, columns % blocksize == 0, columns % (launch.block_k * launch.split_k) == 0, blocksize,
            rounding, launch.split_k, _BAND, launch.block_m, launch.block_n, launch.block_k, num_warps=launch.warps,
            num_stages=launch.stages, enable_fp_fusion=True,
        )  # fmt: skip


def nf4_dense(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, blocksize: int, out: torch.Tensor
) -> None:
    """Fills `out` with `level * absmax`, rounded once to its type; any shape, read as one row of values."""
    size = out.numel()
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _dense[(triton.cdiv(size, _VALUES),)](
            packed, absmax, levels, out, size, blocksize, _VALUES, num_warps=8, enable_fp_fusion=True
        )


@triton.jit  # type: ignore[untyped-decorator]
def _dense(packed, absmax, levels, out, size, blocksize: tl.constexpr, values: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * values
    byte = tl.arange(0, values // 2)
    both = tl.load(packed + first // 2 + byte, mask=first + byte * 2 < size, other=0).to(tl.int32)
    codes = tl.join(both >> 4, both & 15).reshape(values)
    place = first + tl.arange(0, values)
    scale = tl.load(absmax + place // blocksize, mask=place < size, other=0.0)
    table = tl.load(levels + tl.arange(0, 16))
    value = tl.gather(table, codes, 0) * scale
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < size)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    words, absmax, table, row, quads, first, rows, whole_blocks: tl.constexpr, even: tl.constexpr,
    blocksize: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Gives weights (block_n, block_k) float32 of the rows `row` (int64) from column `first` on."""
    words_of_block: tl.constexpr = blocksize // 8
    word = first // 8 + tl.arange(0, block_k // 8)
    held = (row < rows)[:, None] & (even | (word < quads * 4))[None, :]
    codes = tl.load(words + (row[:, None] * quads * 4 + word[None, :]), mask=held, other=0)
    if whole_blocks:
        place = row[:, None] * (quads * 32 // blocksize) + (word // words_of_block)[None, :]
    else:
        place = (row[:, None] * quads * 4 + word[None, :]) // words_of_block
    scale = tl.load(absmax + place, mask=held, other=0.0)
    value = levels_of_words(codes.to(tl.uint32, bitcast=True), table, block_n, block_k // 8)
    return (value * scale[:, :, None, None, None]).reshape(block_n, block_k)


@triton.jit  # type: ignore[untyped-decorator]
def _tiled(  # type: ignore[no-untyped-def]
    x, words, absmax, levels, bias, out, slabs, arrived, rows_in, rows, slab_size, quads, whole_blocks: tl.constexpr,
    even: tl.constexpr, blocksize: tl.constexpr, rounding: tl.constexpr, splits: tl.constexpr, band: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    split, number = tl.program_id(1), tl.program_id(0)
    lines, blocks = tl.cdiv(rows_in, block_m), tl.cdiv(rows, block_n)
    bands = band * blocks
    height = tl.minimum(lines - number // bands * band, band)
    line = number // bands * band + number % bands % height
    block = number % bands // height
    line = line.to(tl.int64) * block_m + tl.arange(0, block_m)
    row = block.to(tl.int64) * block_n + tl.arange(0, block_n)
    columns = quads * 32
    each = tl.cdiv(columns, splits * block_k) * block_k
    table = tl.load(levels + tl.arange(0, 16))
    sums = tl.zeros((block_m, block_n), tl.float32)
    for step in range(0, each, block_k):
        first = split * each + step
        column = first + tl.arange(0, block_k)
        weight = _weights(
            words, absmax, table, row, quads, first, rows, whole_blocks, even, blocksize, block_n, block_k
        )
        held = (line < rows_in)[:, None] & (even | (column < columns))[None, :]
        inputs = tl.load(x + (line[:, None] * columns + column[None, :]), mask=held, other=0.0)
        sums = tl.dot(inputs, tl.trans(rounded(weight, rounding).to(x.dtype.element_ty)), sums, input_precision="ieee")
    place = line[:, None] * rows + row[None, :]
    inside = (line < rows_in)[:, None] & (row < rows)[None, :]
    sums, last = sum_slabs(sums, slabs, arrived, number, split, place, inside, slab_size, splits)
    if last:
        if bias is not None:
            sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)
