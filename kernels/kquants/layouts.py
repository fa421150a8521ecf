"""Bytes of K-quant blocks from codes, in numpy. Layouts: block_q*_K in llama.cpp's ggml-common.h."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["high_bits", "join", "pack_six_bits", "planes", "unpack_six_bits"]

Array: TypeAlias = NDArray[Any]


def planes(codes: Array, bits: int) -> Array:
    """Codes (B, 8, 32) into bytes: plane after plane of 32 codes fills up the next `bits` bits of 32 bytes."""
    each = 8 // bits
    shifts = np.arange(0, 8, bits)[:, None]
    packed: Array = np.bitwise_or.reduce(codes.reshape(len(codes), 8 // each, each, 32) << shifts, axis=2)
    return packed


def high_bits(bits: Array) -> Array:
    """Bits (B, 8, 32) into (B, 32) bytes, one bit for each plane."""
    packed: Array = np.bitwise_or.reduce(bits << np.arange(8)[:, None], axis=1)
    return packed


def pack_six_bits(scale: Array, minimum: Array) -> Array:
    """Scales and minima (B, 8) of Q4_K and Q5_K into (B, 12) bytes; codes above 63 run into their neighbours."""
    low = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = minimum[:, :4] | minimum[:, 4:] >> 4 << 6
    return np.concatenate([first, second, low], axis=1) & 255


def unpack_six_bits(packed: Array) -> tuple[Array, Array]:
    """Scales and minima (B, 8) that a reader finds."""
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=1)
    return scale, np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=1)


def join(*parts: Array) -> Array:
    """The bytes of blocks from their parts, each (B, ...)."""
    count = len(parts[0])
    return np.concatenate([part.reshape(count, -1).astype(np.uint8) for part in parts], axis=1)
