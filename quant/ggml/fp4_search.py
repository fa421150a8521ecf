"""MXFP4: 4-bit floats (E2M1) with a power of two as the scale of 32 weights.

Source: quantize_row_mxfp4_ref and best_index_mxfp4 in llama.cpp's ggml-quants.c (and the OCP Microscaling Formats
v1.0, from which the layout is). The scale follows from the greatest magnitude, so nothing is searched and importance is
not looked at. The bytes are libggml's, except where its C is undefined: a block below 2^-125 would need a negative
exponent; it gets the least one here.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.tiles import COLUMNS, writable

__all__ = ["search_mxfp4"]

Array = NDArray[Any]

_LEVELS: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # twice those of E2M1, for half of the scale
_MIDDLES: Final = (_LEVELS[1:] + _LEVELS[:-1]) / np.float32(2)


def _nearly_powers() -> Array:
    """Counts the numbers just below 2^(n + 1) whose log2f is n + 1, for each n from -127 to 128, (256,) uint32.

    libggml takes the floor of a float32 logarithm. That of 2^k * (1 - j / 2^24) is k - j * 1.4427 / 2^24, and it is
    rounded to k where that is nearer than the number before. Told by integers, it is the same on every machine.
    """
    counts = np.zeros(256, np.uint32)
    for biased in range(256):
        power = biased - 127 + 1
        below = (power - 1).bit_length() - 1 if power > 0 else (-power).bit_length() - 1
        if below > 0:  # numbers next to `power` are 2^(below - 23) apart
            counts[biased] = int(2**below * np.log(2))
    return counts


_NEARLY_POWERS: Final = _nearly_powers()


def search_mxfp4(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to MXFP4: the exponent of the scale, and 32 codes; see `search.Search`."""
    del importance, first  # a block is encoded by itself
    return int(_encode(writable(values), out))


@compiled()
def _exponent(greatest: np.uint32) -> int:
    """Gives the scale's biased exponent for a block whose greatest magnitude has these bits."""
    biased = np.int64(greatest >> np.uint32(23))
    if np.uint32(0x800000) - (greatest & np.uint32(0x7FFFFF)) <= _NEARLY_POWERS[biased]:
        biased += 1
    return max(int(biased) - 2, 0)


@compiled()
def _limits(exponent: int, limits: Array) -> None:
    """Fills `limits` (7,) with the magnitudes above which the next code is nearer; a tie goes to the lower code.

    A code that stands for more than float32 holds is never nearer.
    """
    bits = (exponent - 1) << 23 if exponent > 1 else 0x200000 << exponent
    half_scale = np.uint32(bits).view(np.float32)
    for step in range(limits.size):
        limits[step] = np.float32(np.inf)
        if np.isfinite(_LEVELS[step + 1] * half_scale):
            limits[step] = _MIDDLES[step] * half_scale


@compiled()
def _encode(values: Array, out: Array) -> int:
    """Writes the blocks, and counts those that have NaN or infinity."""
    wild = 0
    codes = np.empty(COLUMNS, np.uint8)
    limits = np.empty(_MIDDLES.size, np.float32)
    for block in range(values.shape[0]):
        row = values[block]
        bits = row.view(np.uint32)
        greatest = np.uint32(0)
        for column in range(COLUMNS):  # the greatest magnitude has the greatest bits
            greatest = max(greatest, bits[column] & np.uint32(0x7FFFFFFF))
        if greatest >= np.uint32(0x7F800000):
            wild += 1
            continue
        exponent = _exponent(greatest)
        _limits(exponent, limits)
        first, second, third, fourth = limits[0], limits[1], limits[2], limits[3]
        fifth, sixth, seventh = limits[4], limits[5], limits[6]
        for column in range(COLUMNS):
            size = abs(row[column])
            code = np.uint8(size > first) + np.uint8(size > second) + np.uint8(size > third)
            code += np.uint8(size > fourth) + np.uint8(size > fifth) + np.uint8(size > sixth) + np.uint8(size > seventh)
            codes[column] = np.uint8(code) | np.uint8(8) * np.uint8(row[column] < -first)
        out[block, 0] = np.uint8(exponent)
        for byte in range(COLUMNS // 2):
            out[block, 1 + byte] = codes[byte] | codes[byte + COLUMNS // 2] << 4
    return wild
