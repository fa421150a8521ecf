"""Decoders of the K-quants: super-blocks of 256 weights, whose sub-blocks have quantized scales.

Layouts: block_q2_K to block_q6_K in llama.cpp's ggml-common.h; formulas: dequantize_row_q*_K in ggml-quants.c. A
decoder takes (B, block bytes) uint8 and writes (B, 256) float32; (2, 4, 32) and the like below are the axes of the 256
weights, slowest first.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_q2_k", "decode_q3_k", "decode_q4_k", "decode_q5_k", "decode_q6_k"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

_BIT_PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]  # four 2-bit planes of one byte
_NIBBLES = np.array([0, 4], np.uint8)[:, None]
_BITS = np.arange(8, dtype=np.uint8)[:, None]


def decode_q2_k(data: Bytes, out: Floats) -> None:
    """Weight = scale * code - minimum; 16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum."""
    blocks = len(data)
    nibbles = data[:, :16].reshape(blocks, 2, 4, 2, 1)
    codes = (data[:, 16:80].reshape(blocks, 2, 1, 32) >> _BIT_PAIRS) & 3
    scale = _half(data, 80) * (nibbles & 0x0F).astype(np.float32)
    minimum = _half(data, 82) * (nibbles >> 4).astype(np.float32)
    target = out.reshape(blocks, 2, 4, 2, 16)
    np.multiply(codes.reshape(target.shape), scale, out=target)
    np.subtract(target, minimum, out=target)


def decode_q3_k(data: Bytes, out: Floats) -> None:
    """Weight = scale * code, codes in [-4, 4); 16 sub-blocks of 16 with 6-bit scales, offset 32."""
    blocks = len(data)
    high = (data[:, :32].reshape(blocks, 1, 32) >> _BITS) & 1
    low = (data[:, 32:96].reshape(blocks, 2, 1, 32) >> _BIT_PAIRS) & 3
    codes = (low.reshape(blocks, 8, 32) | (high << 2)).astype(np.int8) - np.int8(4)
    # Scale s: four low bits in nibble s // 8 of byte s % 8, two high bits in pair s // 4 of byte 8 + s % 4.
    scale_low = (data[:, 96:104].reshape(blocks, 1, 8) >> _NIBBLES) & 0x0F
    scale_high = (data[:, 104:108].reshape(blocks, 1, 4) >> _BIT_PAIRS) & 3
    scale = (scale_low.reshape(blocks, 16) | (scale_high.reshape(blocks, 16) << 4)).astype(np.int8) - np.int8(32)
    target = out.reshape(blocks, 16, 16)
    np.multiply(codes.reshape(target.shape), _half(data, 108, 3) * scale[..., None].astype(np.float32), out=target)


def decode_q4_k(data: Bytes, out: Floats) -> None:
    """Weight = scale * code - minimum; 8 sub-blocks of 32 with 6-bit scales and minima."""
    blocks = len(data)
    codes = (data[:, 16:].reshape(blocks, 4, 1, 32) >> _NIBBLES) & 0x0F
    _scale_and_shift(data, codes.reshape(blocks, 8, 32), out)


def decode_q5_k(data: Bytes, out: Floats) -> None:
    """Weight = scale * code - minimum; as Q4_K with a fifth bit: bit s of byte i belongs to weight i of sub-block s."""
    blocks = len(data)
    fifth = (data[:, 16:48].reshape(blocks, 1, 32) >> _BITS) & 1
    low = (data[:, 48:].reshape(blocks, 4, 1, 32) >> _NIBBLES) & 0x0F
    _scale_and_shift(data, low.reshape(blocks, 8, 32) | (fifth << 4), out)


def decode_q6_k(data: Bytes, out: Floats) -> None:
    """Weight = scale * code, codes in [-32, 32); 16 sub-blocks of 16 with int8 scales."""
    blocks = len(data)
    low = (data[:, :128].reshape(blocks, 2, 1, 64) >> _NIBBLES) & 0x0F
    high = (data[:, 128:192].reshape(blocks, 2, 1, 32) >> _BIT_PAIRS) & 3
    codes = (low.reshape(blocks, 2, 4, 32) | (high << 4)).astype(np.int8) - np.int8(32)
    scale = _half(data, 208, 3) * data[:, 192:208].view(np.int8)[..., None].astype(np.float32)
    target = out.reshape(blocks, 16, 16)
    np.multiply(codes.reshape(target.shape), scale, out=target)


def _half(data: Bytes, offset: int, ndim: int = 5) -> Floats:
    """The float16 at byte `offset` of each block as float32, (B, 1, 1, ...) with `ndim` axes."""
    half = np.ascontiguousarray(data[:, offset : offset + 2]).view("<f2").astype(np.float32)
    return half.reshape(len(data), *(1,) * (ndim - 1))


def _scale_and_shift(data: Bytes, codes: NDArray[Any], out: Floats) -> None:
    """Write scale * code - minimum for codes (B, 8, 32) of Q4_K or Q5_K.

    Of the 12 scale bytes, the first four hold the low six bits of scales 0 to 3, the next four those of minima 0 to 3.
    Scales and minima 4 to 7 have their low nibbles in the last four and their upper two bits on top of the former.
    """
    first, second, third = (data[:, start : start + 4] for start in (4, 8, 12))
    scale = np.concatenate((first & 0x3F, (third & 0x0F) | ((first >> 6) << 4)), axis=1)
    minimum = np.concatenate((second & 0x3F, (third >> 4) | ((second >> 6) << 4)), axis=1)
    target = out.reshape(len(data), 8, 32)
    np.multiply(codes, _half(data, 0, 3) * scale[..., None].astype(np.float32), out=target)
    np.subtract(target, _half(data, 2, 3) * minimum[..., None].astype(np.float32), out=target)
