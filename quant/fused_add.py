"""Adds float64 values to bfloat16 ones and rounds once, in one pass over the memory, compiled by numba.

The same in numpy takes a dozen passes over each block, and several threads that work so wait for the interpreter's lock
between them. Loading numba takes half a second, so this is for merges of large models; the values are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled

__all__ = ["add_to_bfloat16", "add_to_float32"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

_TILE = 512  # values that are worked on together: they stay in the first-level cache


@compiled()
def _widen(stored: Array, bits: Array) -> None:
    for place in range(stored.size):
        bits[place] = np.uint32(stored[place]) << np.uint32(16)


@compiled("contract", "reassoc")
def _squares(values: Array) -> float:
    total = 0.0
    for place in range(values.size):
        total += np.float64(values[place]) * np.float64(values[place])
    return total


@compiled()
def _add(values: Array, delta: Array, sums: Array) -> None:
    for place in range(values.size):
        sums[place] = np.float64(values[place]) + delta[place]


@compiled()
def _narrow(sums: Array, single: Array) -> None:
    for place in range(sums.size):
        single[place] = np.float32(sums[place])


@compiled()
def _rounded(image: np.uint32) -> np.uint16:
    """Rounds the image of a float32 to that of a bfloat16, ties to even."""
    return np.uint16((image + np.uint32(0x7FFF) + ((image >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled()
def _round(bits: Array, out: Array) -> bool:
    """Rounds images of float32; says whether one was a midpoint or not finite."""
    suspect = False
    for place in range(bits.size):
        image = bits[place]
        suspect |= (image & np.uint32(0xFFFF)) == np.uint32(0x8000)
        suspect |= (image & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        out[place] = _rounded(image)
    return suspect


@compiled()
def _repair(sums: Array, single: Array, bits: Array, out: Array) -> None:
    """Rounds again what float32 had put on a midpoint, from the side where the sum lies, and keeps NaN a NaN."""
    for place in range(sums.size):
        image = bits[place]
        if np.isnan(sums[place]):
            out[place] = np.uint16((image >> np.uint32(16)) | np.uint32(0x40))
        elif (image & np.uint32(0xFFFF)) == np.uint32(0x8000):
            exact, near = abs(sums[place]), abs(np.float64(single[place]))
            if exact > near:
                image += np.uint32(1)
            elif exact < near:
                image -= np.uint32(1)
            out[place] = _rounded(image)


@compiled()
def _sum(source: Array, added: Array, sums: Array, single: Array) -> float:
    """Fills `sums` (n,) with `source` (n,), images of bfloat16, plus `added` (n,); gives the squared norm of `source`.

    `single` (n,) float32 is for its use.
    """
    _widen(source, single.view(np.uint32))
    _add(single, added, sums)
    squares: float = _squares(single)
    return squares


@compiled()
def _to_bfloat16(stored: Array, delta: Array, out: Array, norms: Array) -> None:
    sums, single = np.empty(_TILE), np.empty(_TILE, np.float32)
    bits = single.view(np.uint32)
    for line in range(stored.shape[0]):
        norms[line] = 0.0
        for start in range(0, stored.shape[1], _TILE):
            stop = min(start + _TILE, stored.shape[1])
            count, target = stop - start, out[line][start:stop]
            norms[line] += _sum(stored[line][start:stop], delta[line][start:stop], sums[:count], single[:count])
            _narrow(sums[:count], single[:count])
            if _round(bits[:count], target):
                _repair(sums[:count], single[:count], bits[:count], target)


@compiled()
def _to_float32(stored: Array, delta: Array, out: Array, norms: Array) -> None:
    sums, single = np.empty(_TILE), np.empty(_TILE, np.float32)
    for line in range(stored.shape[0]):
        norms[line] = 0.0
        for start in range(0, stored.shape[1], _TILE):
            stop = min(start + _TILE, stored.shape[1])
            count = stop - start
            norms[line] += _sum(stored[line][start:stop], delta[line][start:stop], sums[:count], single[:count])
            _narrow(sums[:count], out[line][start:stop])


def add_to_bfloat16(stored: Array, delta: Float64, out: Array) -> Float64:
    """Fills `out` with `stored + delta`, each value rounded once; NaN stays NaN and becomes quiet.

    Args:
        stored: (n, width) bfloat16, C order.
        delta: (n, width) float64, C order.
        out: (n, width) bfloat16, C order.

    Returns:
        (n,) float64, squared norms of the lines of `stored`.
    """
    norms = np.empty(len(stored))
    _to_bfloat16(stored.view(np.uint16), delta, out.view(np.uint16), norms)
    return norms


def add_to_float32(stored: Array, delta: Float64, out: NDArray[np.float32]) -> Float64:
    """The same with `out` in float32."""
    norms = np.empty(len(stored))
    _to_float32(stored.view(np.uint16), delta, out, norms)
    return norms
