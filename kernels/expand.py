"""Packed words to whole numbers `code - zero`, inside kernels: what the tiled product and dequantize share.

Tiles have outputs along their first and places along their second dimension. A thread reads a word once and keeps what
is made of it: joins put the codes of a word beside each other in its registers, in their order along K, so that 16
bytes of neighbours are what it stores for the tensor cores.

A code becomes a number without an instruction that converts (those run at a quarter of the rate or less): it is put
into the low bits of a float whose unit in the last place is 1, and that float with the zero in its place of the code is
taken off, exactly. For 16-bit floats that happens to two codes at once, half a word apart: of a word of eight 4-bit
codes three are shifts, four a mask with the float's bits, four pack neighbours and four subtract.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["raised_codes", "raised_zero"]


@triton.jit  # type: ignore[untyped-decorator]
def raised_codes(  # type: ignore[no-untyped-def]
    words, output, start, rows, word_rows, dtype: tl.constexpr, bits: tl.constexpr, block_n: tl.constexpr,
    block_k: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """Gives codes of `output` at places start to start + block_k, plus 2^10, 2^7 or 2^23: (block_n, block_k).

    The result is of `dtype` where that has all the bits, else float32 (8 bits and bfloat16). `raised_zero` gives what
    is to be taken off.

    Args:
        words: (word_rows, rows) int32.
        output: (block_n,) int64.
        start: first place; it and block_k are multiples of 16, of 32 for 3 bits: a tile begins and ends with a word.
        rows: N.
        word_rows: rows of `words`.
        dtype: float16, bfloat16 or float32.
        bits: 2, 3, 4 or 8.
        block_n: outputs.
        block_k: places.
        whole: all of the tile is inside; else what is outside counts as codes of 0.
    """
    if bits == 3:
        # 32 codes are three words, or four times 24 bits of eight codes each
        row = start // 32 * 3 + tl.arange(0, block_k // 32) * 3
        first = _words(words, output, row, rows, word_rows, whole)
        second = _words(words, output, row + 1, rows, word_rows, whole)
        third = _words(words, output, row + 2, rows, word_rows, whole)
        held = tl.join(
            tl.join(first, (second >> 16) | (third << 16)), tl.join((first >> 24) | (second << 8), third >> 8)
        )
        # the upper four of eight codes to the upper half
        held = (held & 0xFFF) | ((held << 4) & 0xFFF0000)
    else:
        row = start // (32 // bits) + tl.arange(0, block_k // (32 // bits))
        held = _words(words, output, row, rows, word_rows, whole)
    if bits == 2:
        even = tl.join(_pair(held, 0, dtype, bits), _pair(held, 8, dtype, bits))
        odd = tl.join(_pair(held, 4, dtype, bits), _pair(held, 12, dtype, bits))
        even_after = tl.join(_pair(held, 2, dtype, bits), _pair(held, 10, dtype, bits))
        odd_after = tl.join(_pair(held, 6, dtype, bits), _pair(held, 14, dtype, bits))
        codes = tl.join(tl.join(even, odd), tl.join(even_after, odd_after))
    elif bits == 8:
        codes = tl.join(_pair(held, 0, dtype, bits), _pair(held, 8, dtype, bits))
    else:
        even = tl.join(_pair(held, 0, dtype, bits), _pair(held, 2 * bits, dtype, bits))
        odd = tl.join(_pair(held, bits, dtype, bits), _pair(held, 3 * bits, dtype, bits))
        codes = tl.join(even, odd)
    return tl.reshape(codes, (block_n, block_k))


@triton.jit  # type: ignore[untyped-decorator]
def _words(words, output, row, rows, word_rows, whole: tl.constexpr):  # type: ignore[no-untyped-def]
    pointers = words + row[None, :].to(tl.int64) * rows + output[:, None]
    if whole:
        held = tl.load(pointers)
    else:
        held = tl.load(pointers, mask=(output < rows)[:, None] & (row < word_rows)[None, :], other=0)
    return held.to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(held, shift: tl.constexpr, dtype: tl.constexpr, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives the codes that begin `shift` bits into each half of a word, raised, along a new last dimension."""
    mask: tl.constexpr = (1 << bits) - 1
    if dtype == tl.float16 or (dtype == tl.bfloat16 and bits < 8):
        magic: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
        both = ((held >> shift) & (mask | mask << 16)) | (magic | magic << 16)
        pair = tl.join(both.to(tl.uint16), (both >> 16).to(tl.uint16)).to(dtype, bitcast=True)
    else:
        low, high = (held >> shift) & mask, (held >> (shift + 16)) & mask
        pair = tl.join(low | 0x4B000000, high | 0x4B000000).to(tl.float32, bitcast=True)
    return pair


@triton.jit  # type: ignore[untyped-decorator]
def raised_zero(zero, dtype: tl.constexpr, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives zeros (integers below 2^8; below 2^7 for bfloat16 and fewer than 8 bits) raised as codes are."""
    if dtype == tl.float16:
        raised = (zero.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16 and bits < 8:
        raised = (zero.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        raised = (zero.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return raised
