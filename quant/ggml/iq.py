"""Decoders of the IQ types: codes are indices into fixed tables of values that are not evenly spaced.

IQ4_NL and IQ4_XS use 16 values (kvalues_iq4nl in llama.cpp's ggml-common.h) and are decoded here. The types below 4
bits use grids of up to 2048 entries; those are read through the `gguf` package, which carries the grids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["GRID_TYPES", "decode_iq4_nl", "decode_iq4_xs", "grid_decoder"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

GRID_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")

_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    np.float32,
)
_NIBBLES = np.array([0, 4], np.uint8)[:, None]
_BIT_PAIRS = np.arange(0, 16, 2, dtype=np.uint16)


def decode_iq4_nl(data: Bytes, out: Floats) -> None:
    """Weight = scale * level; (B, 18) uint8 to (B, 32) float32, nibbles as in Q4_0."""
    codes = (data[:, None, 2:] >> _NIBBLES) & 0x0F
    scale = np.ascontiguousarray(data[:, :2]).view("<f2").astype(np.float32)
    np.multiply(_LEVELS[codes.reshape(len(data), 32)], scale, out=out)


def decode_iq4_xs(data: Bytes, out: Floats) -> None:
    """Weight = scale * level; (B, 136) uint8 to (B, 256) float32, 8 sub-blocks of 32 with 6-bit scales, offset 32."""
    blocks = len(data)
    half = np.ascontiguousarray(data[:, :2]).view("<f2").astype(np.float32)
    pairs = np.ascontiguousarray(data[:, 2:4]).view("<u2")
    low = (data[:, 4:8, None] >> _NIBBLES[:, 0]) & 0x0F
    high = ((pairs >> _BIT_PAIRS) & 3).astype(np.uint8)
    scale = (low.reshape(blocks, 8) | (high << 4)).astype(np.int8) - np.int8(32)
    codes = (data[:, 8:].reshape(blocks, 8, 1, 16) >> _NIBBLES) & 0x0F
    target = out.reshape(blocks, 8, 32)
    np.multiply(_LEVELS[codes.reshape(target.shape)], (half * scale)[..., None], out=target)


def grid_decoder(name: str) -> Callable[[Bytes, Floats], None]:
    """Make the decoder of one of `GRID_TYPES`, (B, block bytes) uint8 to (B, 256) float32."""

    def decode(data: Bytes, out: Floats) -> None:
        import gguf  # a slow import that few files need

        np.copyto(out, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))

    return decode
