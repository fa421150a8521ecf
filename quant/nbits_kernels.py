"""Inner loop that rounds blocks of weights to grids and packs their codes, compiled by numba.

It gives what `grid_kernels` gives, in one pass over the weights and several times as fast: the greatest and the least
weight of a block are found in the integer images of the numbers, which processors compare many at a time, and codes
go into bytes while they are in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.grid_kernels import round_scale

__all__ = ["round_blocks"]

Array = NDArray[Any]

_SIGN = 1 << 31
_FLOAT32_DIGITS = 24


@compiled()
def _extremes(images: Array, pair: Array) -> None:
    """Fills `pair` (2,) uint32 with the images of the greatest positive and the least negative of (n,); 0 for none."""
    greatest, least = np.int32(0), np.uint32(0)
    for column in range(images.size):
        image = images[column]
        signed = np.int32(image)
        greatest = signed if signed > greatest else greatest  # negative numbers are negative here
        least = image if image > least else least  # and the greatest here, the greater the farther they are from 0
    pair[0] = np.uint32(greatest)
    pair[1] = least if least >= np.uint32(_SIGN) else np.uint32(0)


@compiled()
def _farthest(block: Array, high: np.float32, low: np.float32) -> np.float32:
    """Gives the number farthest from 0; the first one of two that are equally far."""
    if high != -low:
        return high if high > -low else low
    found = np.float32(0.0)
    for column in range(block.size - 1, -1, -1):
        if abs(block[column]) == high:
            found = block[column]
    return found


@compiled()
def _stored(value: float, precision: int, least: int) -> np.float32:
    """Rounds to the type that scales are stored in; float32 (24 digits) is what processors round to themselves."""
    if precision == _FLOAT32_DIGITS:
        return np.float32(value + 0.0)  # -0 becomes 0, as in `round_scale`
    stored: np.float32 = np.float32(round_scale(value, precision, least))
    return stored


@compiled()
def _fit(
    block: Array, high: np.float32, low: np.float32, bits: int, symmetric: bool, precision: int, least: int
) -> tuple[np.float32, np.float32]:
    """Gives scale and zero of a block: the full range of `grid_kernels.fit_groups`, without a clip search."""
    half, top = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
    if symmetric:
        full = -np.float64(_farthest(block, high, low)) / np.float64(half)
        return _stored(full, precision, least), half
    scale = _stored((np.float64(high) - np.float64(low)) / np.float64(top), precision, least)
    if scale == np.float32(0.0):
        return scale, np.float32(0.0)
    zero = np.float32(np.rint(-np.float64(low) / np.float64(scale)))
    return scale, min(max(zero, np.float32(0.0)), top)


@compiled()
def _choose(block: Array, codes: Array, scale: np.float32, zero: np.float32, top: np.float32) -> None:
    """Fills the first places of `codes` (size,) uint8 with the codes nearest to `block` (n,), n <= size."""
    if scale == np.float32(0.0):
        for column in range(block.size):
            codes[column] = np.uint8(zero)
        return
    for column in range(block.size):
        code = np.rint(block[column] / scale) + zero
        code = code if code > np.float32(0.0) else np.float32(0.0)
        code = code if code < top else top
        codes[column] = np.uint8(np.int32(code))


@compiled()
def _pack(codes: Array, packed: Array, bits: int) -> None:
    if bits == 8:
        for place in range(packed.size):
            packed[place] = codes[place]
    elif bits == 4:
        for place in range(packed.size):
            packed[place] = codes[2 * place] | codes[2 * place + 1] << np.uint8(4)
    else:
        for place in range(packed.size):
            low = codes[4 * place] | codes[4 * place + 1] << np.uint8(2)
            packed[place] = low | codes[4 * place + 2] << np.uint8(4) | codes[4 * place + 3] << np.uint8(6)


@compiled()
def round_blocks(
    weight: Array, packed: Array, scale: Array, zero: Array, size: int, bits: int, symmetric: bool, precision: int,
    least: int,
) -> None:  # fmt: skip
    """Rounds every block of `size` columns of a row to a grid of its own; places beyond a row get the code 0.

    Args:
        weight: (N, K) float32, finite, C-contiguous.
        packed: (N, blocks * size * bits / 8) uint8, to be filled; the first code of a byte is in its low bits.
        scale: (N, blocks) float32, to be filled with scales rounded to the stored type.
        zero: (N, blocks) uint8, to be filled.
        size: columns of a block, a multiple of 4.
        bits: 2, 4 or 8.
        symmetric: zeros are 2^(bits - 1).
        precision: significand bits of the stored scales.
        least: exponent of their least subnormal.
    """
    images = weight.view(np.uint32)
    pair = np.empty(2, np.uint32)
    ends = pair.view(np.float32)
    codes = np.zeros(scale.shape[1] * size, np.uint8)
    columns, top = weight.shape[1], np.float32((1 << bits) - 1)
    for row in range(weight.shape[0]):
        for number in range(scale.shape[1]):
            start, stop = number * size, min((number + 1) * size, columns)
            block = weight[row, start:stop]
            _extremes(images[row, start:stop], pair)
            step, origin = _fit(block, ends[0], ends[1], bits, symmetric, precision, least)
            scale[row, number], zero[row, number] = step, np.uint8(origin)
            _choose(block, codes[start:stop], step, origin, top)
        _pack(codes, packed[row], bits)
