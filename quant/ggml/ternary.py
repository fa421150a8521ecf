"""Decoders of the types with two to four levels: TQ1_0, TQ2_0, Q1_0 and Q2_0.

Layouts: block_tq1_0 and its neighbours in llama.cpp's ggml-common.h; formulas: dequantize_row_* in ggml-quants.c.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_q1_0", "decode_q2_0", "decode_tq1_0", "decode_tq2_0"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
_BIT_PAIRS = np.array([0, 2, 4, 6], np.uint8)


def decode_tq1_0(data: Bytes, out: Floats) -> None:
    """Weight = scale * (trit - 1); (B, 54) uint8 to (B, 256) float32.

    A byte is a fraction of 256 with five ternary digits: multiplying by 3^n modulo 256 brings digit n to the front,
    and the front digit is 3 * byte >> 8. Runs of 32, 16 and 4 bytes hold 5, 5 and 4 digits.
    """
    first_weight = 0
    for start, run, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        fractions = data[:, None, start : start + run] * _POWERS[:digits]
        trits = (fractions.astype(np.uint16) * 3) >> 8
        out[:, first_weight : first_weight + run * digits] = trits.reshape(len(data), run * digits)
        first_weight += run * digits
    np.subtract(out, np.float32(1), out=out)
    np.multiply(out, _half(data, 52), out=out)


def decode_tq2_0(data: Bytes, out: Floats) -> None:
    """Weight = scale * (code - 1); (B, 66) uint8 to (B, 256) float32, four 2-bit planes per run of 32 bytes."""
    codes = (data[:, :64].reshape(len(data), 2, 1, 32) >> _BIT_PAIRS[:, None]) & 3
    np.subtract(codes.reshape(out.shape), np.float32(1), out=out)
    np.multiply(out, _half(data, 64), out=out)


def decode_q1_0(data: Bytes, out: Floats) -> None:
    """Weight = scale with the sign of the bit; (B, 18) uint8 to (B, 128) float32."""
    bits = np.unpackbits(data[:, 2:], axis=1, bitorder="little")
    scale = _half(data, 0)
    np.copyto(out, np.where(bits, scale, -scale))


def decode_q2_0(data: Bytes, out: Floats) -> None:
    """Weight = scale * (code - 1); (B, 18) uint8 to (B, 64) float32, four neighbours per byte."""
    codes = (data[:, 2:, None] >> _BIT_PAIRS) & 3
    np.subtract(codes.reshape(out.shape), np.float32(1), out=out)
    np.multiply(out, _half(data, 0), out=out)


def _half(data: Bytes, offset: int) -> Floats:
    """The float16 at byte `offset` of each block, (B, 1) float32."""
    return np.ascontiguousarray(data[:, offset : offset + 2]).view("<f2").astype(np.float32)
