"""Searches scale and minimum of blocks whose codes count up from a least value: Q4_1 and Q5_1 with importance.

Source: make_qkx3_quants in llama.cpp's ggml-quants.c, whose arithmetic this repeats in its order for 64 blocks at once.
A minimum that is found replaces the one from which the next tries start, there as here. A line through few weights
that count can lie far from the others: where libggml ends with one that float16 cannot store, and writes infinity, the
best one before it is kept here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.tiles import COLUMNS, LANES, gather, nearest, put_codes, refuse, take, weigh

__all__ = ["encode_minimum"]

Array = NDArray[Any]

_TRIES = 37
_FIRST_TRY = np.float32(-0.9)  # added to the greatest code, where the range's end is to lie
_SPACING = np.float32(0.05)
_BEYOND = np.float32(65520)  # the least number that float16 rounds to infinity
_ZERO = np.float32(0)
_ONE = np.float32(1)


@compiled()
def _range_and_sums(tile: Array, weights: Array, low: Array, high: Array, sum_w: Array, sum_x: Array) -> None:
    """Finds each lane's least value, not above 0, its greatest, and the sums of weight and weight * value."""
    for lane in range(LANES):
        low[lane] = high[lane] = tile[0, lane]
        sum_w[lane] = weights[0, lane]
        sum_x[lane] = sum_w[lane] * tile[0, lane]
    for column in range(1, COLUMNS):
        for lane in range(LANES):
            value, weight = tile[column, lane], weights[column, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]
            sum_w[lane] += weight
            sum_x[lane] += weight * value
    for lane in range(LANES):
        low[lane] = _ZERO if low[lane] > _ZERO else low[lane]


@compiled()
def _places(tile: Array, low: Array, inverse: Array, top: np.int32, codes: Array) -> None:
    """Fills `codes` (32, 64) float32 with the nearest codes of an even grid from `low` up."""
    for column in range(COLUMNS):
        for lane in range(LANES):
            codes[column, lane] = nearest(inverse[lane] * (tile[column, lane] - low[lane]), top)


@compiled()
def _code_sums(tile: Array, weights: Array, codes: Array, sum_l: Array, sum_l2: Array, sum_xl: Array) -> None:
    for lane in range(LANES):
        sum_l[lane] = sum_l2[lane] = sum_xl[lane] = _ZERO
    for column in range(COLUMNS):
        for lane in range(LANES):
            code = codes[column, lane]
            weighted = weights[column, lane] * code
            sum_l[lane] += weighted
            sum_l2[lane] += weighted * code
            sum_xl[lane] += weighted * tile[column, lane]


@compiled()
def _fit(sums: Array, scale: Array, minimum: Array) -> None:
    """Fills scale and minimum with the least squares of the codes; without a solution, the scale is NaN.

    Args:
        sums: (5, 64) of weight, weight * value, weight * code, weight * code^2, weight * code * value.
        scale: (64,) float32.
        minimum: (64,) float32, not above 0.
    """
    sum_w, sum_x, sum_l, sum_l2, sum_xl = sums[0], sums[1], sums[2], sums[3], sums[4]
    for lane in range(LANES):
        divisor = sum_w[lane] * sum_l2[lane] - sum_l[lane] * sum_l[lane]
        slope = np.divide(sum_w[lane] * sum_xl[lane] - sum_x[lane] * sum_l[lane], divisor)
        start = np.divide(sum_l2[lane] * sum_x[lane] - sum_l[lane] * sum_xl[lane], divisor)
        slope = np.divide(sum_xl[lane], sum_l2[lane]) if start > _ZERO else slope
        minimum[lane] = _ZERO if start > _ZERO else start
        scale[lane] = slope if divisor > _ZERO else np.float32(np.nan)


@compiled()
def _distance(tile: Array, weights: Array, scale: Array, minimum: Array, codes: Array, error: Array) -> None:
    """Fills `error` (64,) with the weighted squared error of scale * code + minimum."""
    for lane in range(LANES):
        error[lane] = _ZERO
    for column in range(COLUMNS):
        for lane in range(LANES):
            off = scale[lane] * codes[column, lane] + minimum[lane] - tile[column, lane]
            error[lane] += weights[column, lane] * (off * off)


@compiled()
def _search_tile(tile: Array, weights: Array, top: np.int32, found: Array, codes: Array, work: Array) -> None:
    """Searches the lanes of a tile.

    Args:
        tile: (32, 64) float32.
        weights: (32, 64) float32, the cost of each error.
        top: greatest code.
        found: (4, 64) float32, filled with scale, minimum, and the inverse and the minimum that give the codes.
        codes: (32, 64) float32, scratch.
        work: (12, 64) float32, scratch.
    """
    scale, minimum, chosen, chosen_low = found[0], found[1], found[2], found[3]
    low, high, best, error = work[5], work[6], work[7], work[8]
    inverse, new_scale, new_low = work[9], work[10], work[11]
    _range_and_sums(tile, weights, low, high, work[0], work[1])
    for number in range(_TRIES + 1):
        # first the grid over the whole range as it is, then those whose line is fitted to the codes
        numerator = np.float32(top) if number == 0 else _FIRST_TRY + _SPACING * np.float32(number - 1) + np.float32(top)
        for lane in range(LANES):
            inverse[lane] = np.divide(numerator, high[lane] - low[lane])
        _places(tile, low, inverse, top, codes)
        _code_sums(tile, weights, codes, work[2], work[3], work[4])
        _fit(work[:5], new_scale, new_low)
        for lane in range(LANES if number == 0 else 0):
            new_scale[lane], new_low[lane] = np.divide(_ONE, inverse[lane]), low[lane]
        _distance(tile, weights, new_scale, new_low, codes, error)
        for lane in range(LANES):
            # a block without a range keeps the scale 0, its minimum and codes of 0
            empty = number == 0 and not high[lane] > low[lane]
            stored = abs(new_scale[lane]) < _BEYOND and abs(new_low[lane]) < _BEYOND
            better = number == 0 or error[lane] < best[lane]
            if number == 0 or (better and stored):
                scale[lane], minimum[lane] = (_ZERO if empty else new_scale[lane]), new_low[lane]
                chosen[lane], chosen_low[lane] = (_ZERO if empty else inverse[lane]), low[lane]
            if better:
                best[lane], low[lane] = (_ZERO if empty else error[lane]), new_low[lane]


@compiled()
def encode_minimum(
    values: Array, importance: Array, energy: Array, top: int, scales: Array, minima: Array, out: Array
) -> None:
    """Finds the scales, minima and codes of blocks.

    Args:
        values: (B, 32) float32.
        importance: (P, 32) float32; block b has row b % P.
        energy: (B,) float32, mean square of each block's row.
        top: greatest code.
        scales: (B,) float32, filled.
        minima: (B,) float32, filled.
        out: (B, bytes of a block) uint8; all but the four bytes of scale and minimum are filled.
    """
    tile, weights = np.empty((COLUMNS, LANES), np.float32), np.empty((COLUMNS, LANES), np.float32)
    places, codes = np.empty((COLUMNS, LANES), np.float32), np.empty((COLUMNS, LANES), np.uint8)
    found, work = np.empty((4, LANES), np.float32), np.zeros((13, LANES), np.float32)
    for start in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - start)
        take(energy, start, work[12])
        gather(values, start, tile)
        weigh(tile, importance, start, work[12], weights)
        _search_tile(tile, weights, np.int32(top), found, places, work[:12])
        _places(tile, found[3], found[2], np.int32(top), places)
        for column in range(COLUMNS):
            for lane in range(LANES):
                codes[column, lane] = np.uint8(places[column, lane])
        refuse(tile, work[0], found[0])
        for lane in range(count):
            scales[start + lane], minima[start + lane] = found[0, lane], found[1, lane]
            put_codes(codes, lane, out[start + lane, 4:])
