"""Searches the scale of blocks whose codes lie around 0: Q4_0 and Q5_0 with importance.

Source: make_qx_quants in llama.cpp's ggml-quants.c, whose arithmetic this repeats in its order for 64 blocks at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.tiles import COLUMNS, LANES, TINY, farthest, gather, put_codes, refuse, rounded, take, weigh

__all__ = ["encode_signed"]

Array = NDArray[Any]

_TRIES = 9  # scales on each side of the one that puts the extreme value on the lowest code
_SPACING = np.float32(0.1)
_ZERO = np.float32(0)
_ONE = np.float32(1)


@compiled()
def _clipped(place: np.float32, low: np.float32, high: np.float32) -> np.float32:
    code = rounded(place)
    code = low if code < low else code
    return high if code > high else code


@compiled()
def _sums(tile: Array, weights: Array, inverse: Array, top: np.float32, sum_lx: Array, sum_l2: Array) -> None:
    """Sums weight * value * code and weight * code^2 of each lane."""
    for lane in range(LANES):
        sum_lx[lane] = sum_l2[lane] = _ZERO
    for column in range(COLUMNS):
        for lane in range(LANES):
            value, weight = tile[column, lane], weights[column, lane]
            code = _clipped(inverse[lane] * value, -top, top - _ONE)
            sum_lx[lane] += weight * value * code
            sum_l2[lane] += weight * code * code


@compiled()
def _search_tile(tile: Array, weights: Array, extreme: Array, top: np.float32, found: Array, work: Array) -> None:
    """Fills `found` (2, 64) with each lane's scale and the inverse that gives its codes; `work` (4, 64) is scratch."""
    scales, chosen = found[0], found[1]
    inverse, sum_lx, sum_l2, best = work[0], work[1], work[2], work[3]
    for number in range(2 * _TRIES + 1):
        # the extreme value on the lowest code comes first, then the others in order
        step = 0 if number == 0 else number - _TRIES - (1 if number <= _TRIES else 0)
        numerator = -(top + _SPACING * np.float32(step))
        for lane in range(LANES):
            inverse[lane] = np.divide(numerator, extreme[lane])
        _sums(tile, weights, inverse, top, sum_lx, sum_l2)
        for lane in range(LANES):
            better = sum_l2[lane] > _ZERO and sum_lx[lane] * sum_lx[lane] > best[lane] * sum_l2[lane]
            if number == 0 or better:
                scales[lane] = np.divide(sum_lx[lane], sum_l2[lane]) if sum_l2[lane] != _ZERO else _ZERO
                best[lane] = scales[lane] * sum_lx[lane]
                chosen[lane] = inverse[lane]


@compiled()
def encode_signed(values: Array, importance: Array, energy: Array, top: int, scales: Array, out: Array) -> None:
    """Finds the scales and codes of blocks.

    Args:
        values: (B, 32) float32.
        importance: (P, 32) float32; block b has row b % P.
        energy: (B,) float32, mean square of each block's row.
        top: codes are from -top to top - 1, and stored with `top` added.
        scales: (B,) float32, filled.
        out: (B, bytes of a block) uint8; all but the two bytes of the scale are filled.
    """
    tile, weights = np.empty((COLUMNS, LANES), np.float32), np.empty((COLUMNS, LANES), np.float32)
    codes = np.empty((COLUMNS, LANES), np.uint8)
    found, work = np.empty((2, LANES), np.float32), np.zeros((6, LANES), np.float32)
    middle = np.float32(top)
    for start in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - start)
        take(energy, start, work[4])
        gather(values, start, tile)
        weigh(tile, importance, start, work[4], weights)
        farthest(tile, work[5])
        _search_tile(tile, weights, work[5], middle, found, work[:4])
        for column in range(COLUMNS):
            for lane in range(LANES):
                code = _clipped(found[1, lane] * tile[column, lane], -middle, middle - _ONE) + middle
                codes[column, lane] = np.uint8(code if abs(work[5, lane]) >= TINY else _ZERO)
        for lane in range(LANES):
            found[0, lane] = found[0, lane] if abs(work[5, lane]) >= TINY else _ZERO
        refuse(tile, work[0], found[0])
        for lane in range(count):
            scales[start + lane] = found[0, lane]
            put_codes(codes, lane, out[start + lane, 2:])
