"""Packed words to codes, and codes to numbers, inside kernels: parts that the tiled product and dequantize share.

A tile has outputs along its first and places along its second dimension. Each word is read once and spread over the
codes that it holds by a broadcast, so that whatever layout the consumer of the codes wants reaches back to the read:
the words, not the numbers made of them, are exchanged between threads. In memory neighbours along N are neighbours, and
the compiler orders the reads so.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["less_zero", "spread_codes"]


@triton.jit  # type: ignore[untyped-decorator]
def spread_codes(  # type: ignore[no-untyped-def]
    words, output, start, rows, word_rows, bits: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    whole_rows: tl.constexpr, whole_columns: tl.constexpr,
):  # fmt: skip
    """Gives the codes of `output` (block_n,) at places start to start + block_k: (block_n, block_k) uint32.

    `start` and block_k are multiples of 16, of 32 for 3 bits: a tile begins and ends with a word. Codes that do not
    exist hold anything that fits `bits`.

    Args:
        words: (word_rows, rows) int32.
        output: (block_n,) int64, below `rows` where `whole_rows`.
        start: first place.
        rows: N.
        word_rows: rows of `words`.
        bits: 2, 3, 4 or 8.
        block_n: outputs.
        block_k: places.
        whole_rows: no output is outside.
        whole_columns: no place is outside.
    """
    mask: tl.constexpr = (1 << bits) - 1
    if bits == 3:
        # 32 codes in three words: every code begins in one of them, two end in the next
        chunks: tl.constexpr = block_k // 32
        row = start // 32 * 3 + tl.arange(0, chunks) * 3
        first = _words(words, output, row, rows, word_rows, whole_rows, whole_columns)
        second = _words(words, output, row + 1, rows, word_rows, whole_rows, whole_columns)
        third = _words(words, output, row + 2, rows, word_rows, whole_rows, whole_columns)
        bit = (tl.arange(0, 32) * 3)[None, None, :]
        which, shift = bit // 32, (bit % 32).to(tl.uint32)
        low = tl.where(which == 0, first[:, :, None], tl.where(which == 1, second[:, :, None], third[:, :, None]))
        above = tl.where(which == 0, second[:, :, None], third[:, :, None])
        # the upper word moved up by 32 - shift in two steps, because a shift by 32 is not defined
        return tl.reshape(((low >> shift) | ((above << 1) << (31 - shift))) & mask, (block_n, block_k))
    else:
        each: tl.constexpr = 32 // bits
        row = start // each + tl.arange(0, block_k // each)
        held = _words(words, output, row, rows, word_rows, whole_rows, whole_columns)
        shift = (tl.arange(0, each) * bits).to(tl.uint32)[None, None, :]
        return tl.reshape((held[:, :, None] >> shift) & mask, (block_n, block_k))


@triton.jit  # type: ignore[untyped-decorator]
def _words(  # type: ignore[no-untyped-def]
    words, output, row, rows, word_rows, whole_rows: tl.constexpr, whole_columns: tl.constexpr
):
    pointers = words + row[None, :].to(tl.int64) * rows + output[:, None]
    if whole_rows and whole_columns:
        held = tl.load(pointers, eviction_policy="evict_first")
    else:
        inside = (output < rows)[:, None] & (row < word_rows)[None, :]
        held = tl.load(pointers, mask=inside, other=0, eviction_policy="evict_first")
    return held.to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def less_zero(codes, zero, bits: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives `codes - zero`, exactly, as `dtype`.

    A code is put into the low bits of a float whose unit in the last place is 1, and that float with the zero in its
    place of the code is taken off: one operation of integers and one of floats, where a conversion of integers takes
    one of the quarter-rate instructions.

    Args:
        codes: uint32 below 2^bits.
        zero: int32 below 2^8, of a shape that broadcasts.
        bits: of a code.
        dtype: float16, bfloat16 or float32.
    """
    if dtype == tl.float16:  # 1024 + code
        raised = (codes | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        return raised - (zero | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16 and bits < 8:  # 128 + code; zeros of these codes are below 128 too
        raised = (codes | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return raised - (zero | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # 2^23 + code
        raised = (codes | 0x4B000000).to(tl.float32, bitcast=True)
        return (raised - (zero | 0x4B000000).to(tl.float32, bitcast=True)).to(dtype)
