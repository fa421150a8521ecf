"""Codes in 32-bit words as compressed-tensors lays them out, of its present and of its earlier versions.

Codes of 2, 4 and 8 bits fill their words. Those of 3 bits are a continuous stream today, 32 codes in 3 words, and the
last word of a row is filled with zeros; until June 2026 a word held 10 codes and left 2 bits empty (compressed-tensors:
compressors/pack_quantized/helpers.py, pack_to_int32; changed by its pull request 732).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.packing import pack_stream, unpack_stream, unpack_words

__all__ = ["DENSE", "SPARSE", "layout_in", "layout_of", "pack_dense", "unpack", "words_of"]

DENSE = "dense"
SPARSE = "sparse"  # whole codes in every word, as before June 2026

Codes = NDArray[np.uint8]


def words_of(count: int, bits: int, layout: str = DENSE) -> int:
    """Number of 32-bit words that hold so many codes."""
    return -(-count * bits // 32) if layout == DENSE else -(-count // (32 // bits))


def layout_of(words: int, count: int, bits: int) -> str | None:
    """Says how so many codes lie in so many words.

    Returns:
        `DENSE`, `SPARSE`, or None where both need as many words.

    Raises:
        ValueError: no layout needs that many.
    """
    fitting = [layout for layout in (DENSE, SPARSE) if words_of(count, bits, layout) == words]
    if not fitting:
        raise ValueError(f"{words_of(count, bits)} words")
    if len(fitting) == 1:
        return fitting[0]
    return DENSE if 32 % bits == 0 else None


def layout_in(*words: NDArray[Any]) -> str:
    """Says by their values how codes of 3 bits lie in words: in the sparse layout the highest two bits are zero."""
    return (
        DENSE if any((np.ascontiguousarray(part).view(np.uint32) >> np.uint32(30)).any() for part in words) else SPARSE
    )


def pack_dense(codes: Codes, bits: int) -> NDArray[np.int32]:
    """Packs the last dimension as one stream of bits, low bits first.

    Args:
        codes: (..., n) uint8, each below 2^bits.
        bits: 2, 3, 4 or 8.

    Returns:
        (..., ceil(n * bits / 32)) int32; what is left of the last word is zero.
    """
    count = codes.shape[-1]
    period = math.lcm(bits, 32) // bits
    padded = codes
    if rest := count % period:
        padded = np.zeros((*codes.shape[:-1], count - rest + period), np.uint8)
        padded[..., :count] = codes
    return np.ascontiguousarray(pack_stream(padded, bits)[..., : words_of(count, bits)])


def unpack(words: NDArray[Any], bits: int, count: int, layout: str) -> Codes:
    """Gives back the first `count` codes of the last dimension.

    Args:
        words: (..., n) int32, n as `words_of` says.
        bits: 2, 3, 4 or 8.
        count: codes wanted.
        layout: what `layout_of` says, or `layout_in` where that cannot tell.
    """
    if layout == SPARSE:
        return unpack_words(words, bits, count)
    period = math.lcm(bits, 32) // 32  # words after which a word begins with a code again
    padded = words
    if rest := words.shape[-1] % period:
        padded = np.zeros((*words.shape[:-1], words.shape[-1] - rest + period), np.int32)
        padded[..., : words.shape[-1]] = words
    return unpack_stream(padded, bits, padded.shape[-1] * 32 // bits)[..., :count]
