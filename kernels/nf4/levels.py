"""From words of eight 4-bit codes to their levels: what the kernels of these types share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["levels_of_words", "rounded"]


@triton.jit  # type: ignore[untyped-decorator]
def levels_of_words(words, table, rows: tl.constexpr, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives (rows, count, 2, 2, 2) float32: the levels of the codes of `words` (rows, count) uint32 in their order.

    `table` (16,) float32 is in registers; lookups are shuffles inside one warp, or reads of shared memory, where 16
    entries lie in 16 banks. Of the four bytes of a word the low ones come first, in a byte the high half. Codes are
    joined, not spread out by shifting a copy for each: a thread that holds a word then holds all of its levels.
    """
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    codes = (tl.join(even, odd) & 15).to(tl.int32)
    return tl.gather(table, codes.reshape(rows * count * 8), 0).reshape(rows, count, 2, 2, 2)


@triton.jit  # type: ignore[untyped-decorator]
def rounded(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds float32 to "float16" or "bfloat16", ties to even, and gives float32; None leaves it as it is."""
    if dtype == "float16":
        values = values.to(tl.float16).to(tl.float32)
    elif dtype == "bfloat16":
        # by its bits, because the interpreter cuts them off
        bits = values.to(tl.uint32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values
