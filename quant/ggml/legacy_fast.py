"""Q4_0, Q4_1, Q5_0 and Q5_1 without importance, compiled: the bytes of `legacy`, two to three times as fast.

Loading numba takes as long as encoding a hundred million weights, so this is for large tensors, and for runs that have
loaded it for another type. Formulas and corners are those of `legacy`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.tiles import COLUMNS, LANES, farthest, gather, put_halves, refuse, writable

__all__ = ["encode_q4_0", "encode_q4_1", "encode_q5_0", "encode_q5_1"]

Array = NDArray[Any]

_ZERO = np.float32(0)
_ONE = np.float32(1)
_HALF = np.float32(0.5)
_INFINITE = np.float32(np.inf)
_ZERO_BYTE = np.uint8(0)
_LOW = np.uint8(15)
_HALVES = COLUMNS // 2


def encode_q4_0(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q4_0; see `search.Search`."""
    del importance, first
    return _encode_signed(values, 8, out)


def encode_q5_0(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q5_0; see `search.Search`."""
    del importance, first
    return _encode_signed(values, 16, out)


def encode_q4_1(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q4_1; see `search.Search`."""
    del importance, first
    return _encode_minimum(values, 15, out)


def encode_q5_1(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q5_1; see `search.Search`."""
    del importance, first
    return _encode_minimum(values, 31, out)


def _encode_signed(values: Array, middle: int, out: Array) -> int:
    scales = np.empty(len(values), np.float32)
    _signed_blocks(writable(values), middle, scales, out)
    return int(np.count_nonzero(put_halves(scales, out)))


def _encode_minimum(values: Array, top: int, out: Array) -> int:
    scales, minima = np.empty(len(values), np.float32), np.empty(len(values), np.float32)
    _minimum_blocks(writable(values), top, scales, minima, out)
    return int(np.count_nonzero(put_halves(scales, out) | put_halves(minima, out[:, 2:])))


@compiled()
def _invert(scale: Array, inverse: Array) -> None:
    """Fills `inverse` with 1 / scale, and 0 where that is infinite."""
    for lane in range(LANES):
        quotient = np.divide(_ONE, scale[lane])
        inverse[lane] = quotient if abs(quotient) < _INFINITE else _ZERO


@compiled()
def _pack(codes: Array, start: int, head: int, packed: Array, out: Array) -> None:
    """Packs `codes` (32, 64) of the blocks from `start` on behind `head` bytes of each; `packed` (16, 64) is scratch.

    Low halves are nibbles at the end of the block; fifth bits come before them if there is room.
    """
    first = out.shape[1] - _HALVES
    for byte in range(_HALVES):
        for lane in range(LANES):
            packed[byte, lane] = (codes[byte, lane] & _LOW) | (codes[byte + _HALVES, lane] & _LOW) << 4
    for lane in range(min(LANES, out.shape[0] - start)):
        for byte in range(_HALVES):
            out[start + lane, first + byte] = packed[byte, lane]
    if first == head:
        return
    for byte in range(4):
        for lane in range(LANES):
            packed[byte, lane] = _ZERO_BYTE
        for bit in range(8):
            for lane in range(LANES):
                packed[byte, lane] |= np.uint8(codes[8 * byte + bit, lane] >> 4) << np.uint8(bit)
    for lane in range(min(LANES, out.shape[0] - start)):
        for byte in range(4):
            out[start + lane, head + byte] = packed[byte, lane]


@compiled()
def _signed_blocks(values: Array, middle: int, scales: Array, out: Array) -> None:
    tile, work = np.empty((COLUMNS, LANES), np.float32), np.empty((3, LANES), np.float32)
    codes, packed = np.empty((COLUMNS, LANES), np.uint8), np.empty((_HALVES, LANES), np.uint8)
    scale, inverse, offset = work[0], work[1], work[2]
    half, top = np.float32(middle) + _HALF, np.float32(2 * middle - 1)
    for start in range(0, values.shape[0], LANES):
        gather(values, start, tile)
        farthest(tile, scale)
        for lane in range(LANES):
            scale[lane] = np.divide(scale[lane], np.float32(-middle))
        _invert(scale, inverse)
        for lane in range(LANES):  # a scale that is too small for an inverse has codes 0; a scale of 0 those of 0
            offset[lane] = half if scale[lane] == _ZERO or inverse[lane] != _ZERO else _ZERO
        for column in range(COLUMNS):
            for lane in range(LANES):
                place = tile[column, lane] * inverse[lane] + offset[lane]
                codes[column, lane] = np.uint8(np.int32(place if place < top else top))
        refuse(tile, inverse, scale)
        for lane in range(min(LANES, values.shape[0] - start)):
            scales[start + lane] = scale[lane]
        _pack(codes, start, 2, packed, out)


@compiled()
def _limits(tile: Array, low: Array, high: Array) -> None:
    """Fills in each lane's least and greatest value, of equal ones the first."""
    for lane in range(LANES):
        low[lane] = high[lane] = tile[0, lane]
    for column in range(1, COLUMNS):
        for lane in range(LANES):
            value = tile[column, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]


@compiled()
def _minimum_blocks(values: Array, top: int, scales: Array, minima: Array, out: Array) -> None:
    tile, work = np.empty((COLUMNS, LANES), np.float32), np.empty((4, LANES), np.float32)
    codes, packed = np.empty((COLUMNS, LANES), np.uint8), np.empty((_HALVES, LANES), np.uint8)
    low, high, scale, inverse = work[0], work[1], work[2], work[3]
    for start in range(0, values.shape[0], LANES):
        gather(values, start, tile)
        _limits(tile, low, high)
        for lane in range(LANES):
            scale[lane] = np.divide(high[lane] - low[lane], np.float32(top))
        _invert(scale, inverse)
        for column in range(COLUMNS):
            for lane in range(LANES):
                codes[column, lane] = np.uint8(np.int32((tile[column, lane] - low[lane]) * inverse[lane] + _HALF))
        refuse(tile, inverse, scale)
        for lane in range(min(LANES, values.shape[0] - start)):
            scales[start + lane], minima[start + lane] = scale[lane], low[lane]
        _pack(codes, start, 4, packed, out)
