"""Packed words to whole numbers `code - zero`, inside kernels: what the tiled product and dequantize share.

Tiles have outputs along their first and places along their second dimension. A thread reads a word once and keeps what
is made of it: all arithmetic is done on tiles of the words' shape, and joins at the end put the numbers beside each
other in the thread's registers, in their order along K, so that 16 bytes of neighbours are what it stores for the
tensor cores.

A code becomes a number without an instruction that converts (those run at a quarter of the rate or less): it is put
into the low bits of a float whose unit in the last place is 1, and that float with the zero in its place of the code is
taken off, exactly. For 16-bit floats that happens to two codes at once, half a word apart: of a word of eight 4-bit
codes three are shifts, four a mask with the float's bits, four pack neighbours and four subtract.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expand", "halves", "raised"]


def halves(bits: int) -> int:
    """Gives the argument `masks` of `expand` for a number of bits."""
    return ((1 << bits) - 1) * 0x10001


@triton.jit  # type: ignore[untyped-decorator]
def expand(  # type: ignore[no-untyped-def]
    words, output, start, rows, word_rows, masks, middle, step, dtype: tl.constexpr, bits: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """Gives the numbers of `output` at places start to start + block_k: (block_n, block_k) of `dtype`.

    Without `middle` it gives the raised codes themselves, float32 where `dtype` has too few bits (8 bits, bfloat16).

    Args:
        words: (word_rows, rows) int32.
        output: (block_n,) int64.
        start: first place; it and block_k are multiples of 16, of 32 for 3 bits: a tile begins and ends with a word.
        rows: N.
        word_rows: rows of `words`.
        masks: 2^bits - 1 in each half of 32 bits, as an argument of the kernel: were it a constant, it would be put
            into a register anew for each use, because an instruction takes one constant and the float's bits are one.
        middle: (block_n, 1), zeros made by `raised`; None: nothing is taken off.
        step: (block_n, 1) scales that code - zero is multiplied with, rounded to `dtype` once; None: they are not.
        dtype: float16, bfloat16 or float32.
        bits: 2, 3, 4 or 8.
        block_n: outputs.
        block_k: places.
        whole: all of the tile is inside; else what is outside has codes of 0.
    """
    if bits == 3:
        # 32 codes are three words, or four times 24 bits of eight codes each
        row = start // 32 * 3 + tl.arange(0, block_k // 32) * 3
        first = _words(words, output, row, rows, word_rows, whole)
        second = _words(words, output, row + 1, rows, word_rows, whole)
        third = _words(words, output, row + 2, rows, word_rows, whole)
        low = tl.join(
            _eight(first, masks, middle, step, dtype), _eight((first >> 24) | (second << 8), masks, middle, step, dtype)
        )
        high = tl.join(
            _eight((second >> 16) | (third << 16), masks, middle, step, dtype),
            _eight(third >> 8, masks, middle, step, dtype),
        )
        numbers = tl.permute(tl.join(low, high), (0, 1, 6, 5, 2, 3, 4))
    else:
        row = start // (32 // bits) + tl.arange(0, block_k // (32 // bits))
        held = _words(words, output, row, rows, word_rows, whole)
        if bits == 2:
            even = _four(held, 0, 4, masks, middle, step, dtype, bits)
            numbers = tl.join(even, _four(held, 2, 4, masks, middle, step, dtype, bits))
        elif bits == 4:
            numbers = _four(held, 0, 4, masks, middle, step, dtype, bits)
        else:
            first = _pair(held, 0, masks, middle, step, dtype, bits)
            numbers = tl.join(first, _pair(held, 8, masks, middle, step, dtype, bits))
    return tl.reshape(numbers, (block_n, block_k))


@triton.jit  # type: ignore[untyped-decorator]
def _words(words, output, row, rows, word_rows, whole: tl.constexpr):  # type: ignore[no-untyped-def]
    pointers = words + row[None, :].to(tl.int64) * rows + output[:, None]
    if whole:
        held = tl.load(pointers)
    else:
        held = tl.load(pointers, mask=(output < rows)[:, None] & (row < word_rows)[None, :], other=0)
    return held.to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _eight(held, masks, middle, step, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives the eight 3-bit codes of 24 bits, raised, in new last dimensions."""
    halves = (held & 0xFFF) | ((held << 4) & 0xFFF0000)  # the upper four to the upper half
    return _four(halves, 0, 3, masks, middle, step, dtype, 3)


@triton.jit  # type: ignore[untyped-decorator]
def _four(  # type: ignore[no-untyped-def]
    held, first: tl.constexpr, apart: tl.constexpr, masks, middle, step, dtype: tl.constexpr, bits: tl.constexpr
):
    """Gives four codes of each half of a word: new dimensions for the half and for which of four, 2 by 2."""
    even = tl.join(
        _pair(held, first, masks, middle, step, dtype, bits),
        _pair(held, first + 2 * apart, masks, middle, step, dtype, bits),
    )
    odd = tl.join(
        _pair(held, first + apart, masks, middle, step, dtype, bits),
        _pair(held, first + 3 * apart, masks, middle, step, dtype, bits),
    )
    return tl.join(even, odd)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(held, shift: tl.constexpr, masks, middle, step, dtype: tl.constexpr, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives the numbers whose codes begin `shift` bits into the halves of a word, in a new last dimension."""
    if dtype == tl.float16 or (dtype == tl.bfloat16 and bits < 8):
        magic: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
        both = ((held >> shift) & masks) | (magic | magic << 16)
        low = both.to(tl.uint16).to(dtype, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        mask: tl.constexpr = (1 << bits) - 1
        low = (((held >> shift) & mask) | 0x4B000000).to(tl.float32, bitcast=True)
        high = (((held >> (shift + 16)) & mask) | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.join(_scaled(low, middle, step, dtype), _scaled(high, middle, step, dtype))


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(number, middle, step, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    if middle is not None:
        number -= middle
        if step is not None:
            # scales of this type: one rounding, as that of a float32 product, for |code - zero| has 9 bits at most
            number *= step if step.dtype == number.dtype else step.to(tl.float32)
        number = number.to(dtype)
    return number


@triton.jit  # type: ignore[untyped-decorator]
def raised(number, dtype: tl.constexpr, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives integers below 2^8 (below 2^7 for bfloat16 and fewer than 8 bits) as `expand` makes floats of codes."""
    if dtype == tl.float16:
        lifted = (number.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16 and bits < 8:
        lifted = (number.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        lifted = (number.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return lifted
