"""Decoders of MXFP4 and NVFP4: 4-bit floats (E2M1) with an 8-bit float scale per block.

Sources: OCP Microscaling Formats (MX) v1.0; dequantize_row_mxfp4 and dequantize_row_nvfp4 in llama.cpp's
ggml-quants.c. ggml doubles the levels to make them integers and halves the scales.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_mxfp4", "decode_nvfp4"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

# Twice the values of E2M1. Code 8 is -0 in the standard; ggml's integer table makes it +0.
_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_NIBBLES = np.array([0, 4], np.uint8)[:, None]


def decode_mxfp4(data: Bytes, out: Floats) -> None:
    """2^(e - 127) * level; (B, 17) uint8 to (B, 32) float32, nibbles as in Q4_0."""
    codes = (data[:, None, 1:] >> _NIBBLES) & 0x0F
    np.multiply(_LEVELS[codes.reshape(out.shape)], _half_powers_of_two()[data[:, :1]], out=out)


def decode_nvfp4(data: Bytes, out: Floats) -> None:
    """Weight = scale * level; (B, 36) uint8 to (B, 64) float32, 4 sub-blocks of 16, each as Q4_0 with 8 bytes."""
    blocks = len(data)
    codes = (data[:, 4:].reshape(blocks, 4, 1, 8) >> _NIBBLES) & 0x0F
    target = out.reshape(blocks, 4, 16)
    np.multiply(_LEVELS[codes.reshape(target.shape)], _half_e4m3()[data[:, :4, None]], out=target)


@cache
def _half_powers_of_two() -> Floats:
    """Half of the E8M0 scale 2^(e - 127), for e in [0, 256); ggml reads 255, the standard's NaN, as 2^128."""
    return np.ldexp(np.ones(256, np.float32), np.arange(256) - 128)


@cache
def _half_e4m3() -> Floats:
    """Half of the scale UE4M3 for each byte; the sign bit is ignored, and ggml reads 0 and 127 (NaN) as 0."""
    byte = np.arange(256)
    exponent, fraction = (byte >> 3) & 0x0F, byte & 7
    value = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(1 + fraction / 8, exponent - 7))
    value[[0, 127]] = 0
    return np.asarray(value / 2, np.float32)
