"""A packed matrix as a dense one: for products with so many input rows that cuBLAS wins, and for other uses.

A program turns a tile of words, read along N as they lie, into a tile of weights, written along K as a dense matrix
lies; in between the tile passes through shared memory. Where places along K hold other columns (`order`), a program
writes a tile of neighbouring columns and gathers the words that hold their codes: whole lines of N are read, several
times each, but from the L2 cache, because all columns of a block of outputs follow each other.

Compiled for sm_90 (bfloat16, 4 bits, zeros), a tile of 64 outputs and 128 places takes 40 registers and 16 KiB of
shared memory; all reads of words and all writes are 16 bytes wide. Interpreted and compiled, not timed on hardware yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from quantpress.kernels.expand import expand, halves, raised
from quantpress.kernels.launch import check_device
from quantpress.kernels.packed import PackedWeight

__all__ = ["dequantize"]

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_OUTPUTS = 64  # of a tile
_PLACES = 128  # of a tile: rows of 256 bytes are written, 64 weights by a thread
_GATHERED = 32  # columns of a tile whose words are gathered
_WARPS = 4


def dequantize(
    weight: PackedWeight, dtype: torch.dtype, *, out: torch.Tensor | None = None, ordered: bool = True
) -> torch.Tensor:
    """Gives the dense matrix (N, K) that the weight stands for: scale * (code - zero) in float32, rounded to `dtype`.

    Args:
        weight: the packed matrix.
        dtype: float16, bfloat16 or float32.
        out: (N, K) of that type to fill.
        ordered: columns stand in their own order; else in that of the weight's places, which reads and writes less
            where the weight has an order: multiply x[:, weight.order] with it.

    Raises:
        ValueError: types, shapes or devices that do not fit.
    """
    if dtype not in _TYPES:
        raise ValueError(f"{dtype}: wanted float16, bfloat16 or float32")
    shape, device = (weight.rows, weight.columns), weight.words.device
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    if out.dtype != dtype or tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, wanted contiguous {dtype} {shape}")
    check_device(_dequantize, weight.words, out)
    if not weight.rows:
        return out
    place = None
    if weight.order is not None and ordered:
        place = torch.empty(weight.columns, dtype=torch.int32, device=device)
        place[weight.order] = torch.arange(weight.columns, dtype=torch.int32, device=device)
    block_n, block_k = _OUTPUTS, _GATHERED if place is not None else _PLACES
    if place is None and weight.groups > 1 and math.gcd(weight.group_size, _PLACES) >= 32:
        block_k = math.gcd(weight.group_size, _PLACES)  # one scale for each output of a tile
    blocks = triton.cdiv(weight.rows, block_n) * triton.cdiv(weight.columns, block_k)
    whole = weight.rows % block_n == 0 and weight.columns % block_k == 0
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _dequantize[(blocks,)](
            weight.words, weight.scale, weight.zero, place, out, weight.rows, weight.columns, weight.words.shape[0],
            halves(weight.bits),
            weight.group_size, weight.group_size % block_k == 0 or weight.groups == 1, weight.bits, whole, block_n,
            block_k, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]
    words, scale, zero, place_of, out, rows, columns, word_rows, masks, group_size, one_group: tl.constexpr,
    bits: tl.constexpr, whole: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    blocks_k = tl.cdiv(columns, block_k)
    start = tl.program_id(0) % blocks_k * block_k
    output = (tl.program_id(0) // blocks_k * block_n + tl.arange(0, block_n)).to(tl.int64)
    column = start + tl.arange(0, block_k)
    inside = (output < rows)[:, None] & (column < columns)[None, :]
    if one_group and place_of is None:
        at = (start // group_size * rows + output)[:, None]
        step = tl.load(scale + at, mask=(output < rows)[:, None], other=0.0)
        middle = tl.full((block_n, 1), 1 << (bits - 1), tl.uint8)
        if zero is not None:
            middle = tl.load(zero + at, mask=(output < rows)[:, None], other=0)
        weights = expand(
            words, output, start, rows, word_rows, masks, raised(middle, dtype, bits), step, dtype, bits, block_n,
            block_k, whole,
        )  # fmt: skip
    else:
        place = column
        if place_of is None:
            weights = expand(
                words, output, start, rows, word_rows, masks, None, None, dtype, bits, block_n, block_k, whole
            )
        else:
            place = tl.load(place_of + column, mask=column < columns, other=0)
            weights = _gathered(words, output, place, rows, word_rows, dtype, bits, inside)
        at = (place // group_size).to(tl.int64)[None, :] * rows + output[:, None]
        middle = tl.full((1, 1), 1 << (bits - 1), tl.uint8)
        if zero is not None:
            middle = tl.load(zero + at, mask=inside, other=0)
        weights -= raised(middle, dtype, bits)
        step = tl.load(scale + at, mask=inside, other=0.0)
        weights *= step if step.dtype == weights.dtype else step.to(tl.float32)
    target = out + output[:, None] * columns + column[None, :]
    if whole:
        tl.store(target, weights.to(dtype))
    else:
        tl.store(target, weights.to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gathered(  # type: ignore[no-untyped-def]
    words, output, place, rows, word_rows, dtype: tl.constexpr, bits: tl.constexpr, inside
):
    """Gives the codes at any places, raised: (outputs, places)."""
    bit = place * bits
    row, shift = (bit // 32).to(tl.int64), (bit % 32).to(tl.uint32)[None, :]
    pointers = words + row[None, :] * rows + output[:, None]
    held = tl.load(pointers, mask=inside, other=0).to(tl.uint32, bitcast=True)
    codes = held >> shift
    if bits == 3:
        # what a code has in the next word; a last word has no code that goes on
        onward = inside & ((shift > 29) & (row + 1 < word_rows)[None, :])
        after = tl.load(pointers + rows, mask=onward, other=0).to(tl.uint32, bitcast=True)
        codes |= (after << 1) << (31 - shift)  # in two steps: a shift by 32 is not defined
    return raised(codes & ((1 << bits) - 1), dtype, bits)
