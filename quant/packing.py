"""Codes in 32-bit words, as quantized checkpoints keep them: low bits first.

Two ways are in use: a continuous stream of bits (GPTQ: 32 codes of 3 bits fill 3 words), and as many whole codes as fit
a word (compressed-tensors: 10 codes of 3 bits, 2 bits unused). For 2, 4 and 8 bits they are the same.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError

__all__ = ["pack_stream", "pack_words", "unpack_stream", "unpack_words"]

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]


def pack_words(codes: Codes, bits: int) -> Words:
    """Packs the last dimension, 32 // bits codes to a word; the last word is filled with zeros.

    Args:
        codes: (..., n) uint8, each below 2^bits.
        bits: 2, 3, 4 or 8.

    Returns:
        (..., ceil(n / (32 // bits))) int32.
    """
    per_word = 32 // bits
    count = -(-codes.shape[-1] // per_word)
    padded = codes
    if codes.shape[-1] != count * per_word:
        padded = np.zeros((*codes.shape[:-1], count * per_word), np.uint8)
        padded[..., : codes.shape[-1]] = codes
    fields = padded.reshape(*codes.shape[:-1], count, per_word)
    words = np.zeros(fields.shape[:-1], np.uint32)
    for place in range(per_word):
        words |= fields[..., place].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def unpack_words(words: NDArray[Any], bits: int, count: int) -> Codes:
    """Gives back the first `count` codes of the last dimension; see `pack_words`.

    Raises:
        LayoutError: the words hold fewer.
    """
    per_word = 32 // bits
    _check(words, count, words.shape[-1] * per_word)
    values = np.ascontiguousarray(words).view(np.uint32)
    fields = np.empty((*values.shape, per_word), np.uint8)
    for place in range(per_word):
        fields[..., place] = (values >> np.uint32(bits * place)) & np.uint32((1 << bits) - 1)
    return fields.reshape(*values.shape[:-1], values.shape[-1] * per_word)[..., :count]


def pack_stream(codes: Codes, bits: int) -> Words:
    """Packs the last dimension as one stream of bits.

    Args:
        codes: (..., n) uint8, each below 2^bits; n * bits is a multiple of 32.
        bits: 2, 3, 4 or 8.

    Returns:
        (..., n * bits / 32) int32.

    Raises:
        LayoutError: n codes do not fill whole words.
    """
    count = codes.shape[-1]
    if count * bits % 32:
        raise LayoutError(f"{count} codes of {bits} bits do not fill whole 32-bit words")
    if 32 % bits == 0:
        return pack_words(codes, bits)
    period = math.lcm(bits, 32) // bits  # codes after which a word begins with a code again
    fields = codes.reshape(*codes.shape[:-1], count // period, period)
    words = np.zeros((*fields.shape[:-1], period * bits // 32), np.uint32)
    for place in range(period):
        word, shift = divmod(place * bits, 32)
        field = fields[..., place].astype(np.uint64) << np.uint64(shift)
        words[..., word] |= field.astype(np.uint32)
        if shift + bits > 32:
            words[..., word + 1] |= (field >> np.uint64(32)).astype(np.uint32)
    return words.reshape(*codes.shape[:-1], count * bits // 32).view(np.int32)


def unpack_stream(words: NDArray[Any], bits: int, count: int) -> Codes:
    """Gives back `count` codes of the last dimension; see `pack_stream`.

    Raises:
        LayoutError: the words hold another number.
    """
    if count * bits != words.shape[-1] * 32:
        raise LayoutError(f"{words.shape[-1]} words of 32 bits hold {words.shape[-1] * 32 / bits:g} codes, not {count}")
    if 32 % bits == 0:
        return unpack_words(words, bits, count)
    period = math.lcm(bits, 32) // bits
    values = np.ascontiguousarray(words).view(np.uint32)
    grouped = values.reshape(*values.shape[:-1], count // period, period * bits // 32).astype(np.uint64)
    codes = np.empty((*grouped.shape[:-1], period), np.uint8)
    for place in range(period):
        word, shift = divmod(place * bits, 32)
        field = grouped[..., word] >> np.uint64(shift)
        if shift + bits > 32:
            field = field | (grouped[..., word + 1] << np.uint64(32 - shift))
        codes[..., place] = field & np.uint64((1 << bits) - 1)
    return codes.reshape(*values.shape[:-1], count)


def _check(words: NDArray[Any], count: int, held: int) -> None:
    if count > held:
        raise LayoutError(f"{words.shape[-1]} words hold {held} codes, {count} are wanted")
