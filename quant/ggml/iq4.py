"""IQ4_NL and IQ4_XS: 4-bit codes of 16 levels that are not evenly spaced, and a scale found by trying sixteen.

Source: quantize_row_iq4_nl_impl and best_index_int8 in llama.cpp's ggml-quants.c, with or without importance; the bytes
are libggml's. It finds the nearest level of each weight by halving an interval. The levels are integers, so the places
where the nearest one changes are half-integers and exact in float32: here the level is found by comparing with those
fifteen, which is done for many weights at once. A tie goes to the higher level, and NaN to the highest.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.tiles import (
    COLUMNS,
    LANES,
    TINY,
    farthest,
    gather,
    put_halves,
    put_nibbles,
    refuse,
    rounded,
    squares,
    take,
    weigh,
    writable,
)

__all__ = ["search_iq4_nl", "search_iq4_xs"]

Array = NDArray[Any]

_TRIES = 7  # scales on each side of the one that puts the extreme value on the lowest level
_LOWEST = np.float32(-127)
_ZERO = np.float32(0)
_ONE = np.float32(1)
_SUBS: Final = 8  # sub-blocks of IQ4_XS
_NONE: Final = np.empty((0, COLUMNS), np.float32)


def search_iq4_nl(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to IQ4_NL: a float16 scale and 32 codes; see `search.Search`."""
    values = writable(values)
    scales, energy = np.empty(len(values), np.float32), np.zeros(len(values), np.float32)
    if importance is not None:
        squares(values, energy)
        energy *= np.float32(2 / COLUMNS)
    _find_scales(values, _NONE if importance is None else writable(importance), first, energy, scales)
    inverse = np.empty_like(scales)
    _inverses(scales, inverse)
    _encode(values, inverse, 1, 2, out)
    return int(np.count_nonzero(put_halves(scales, out)))


def search_iq4_xs(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to IQ4_XS: a float16 scale, eight 6-bit scales and 256 codes; see `search.Search`."""
    values = writable(values)
    subs = values.reshape(-1, COLUMNS)
    scales, energy = np.empty(len(subs), np.float32), np.zeros(len(values), np.float32)
    costs = _NONE
    if importance is not None:
        costs = writable(importance).reshape(-1, COLUMNS)
        squares(values, energy)
        energy *= np.float32(2 / (_SUBS * COLUMNS))
    _find_scales(subs, costs, first * _SUBS, np.repeat(energy, _SUBS), scales)
    heads, inverse = np.empty(len(values), np.float32), np.empty_like(scales)
    _common_scales(scales.reshape(-1, _SUBS), heads, inverse.reshape(-1, _SUBS), out)
    _encode(subs, inverse, _SUBS, 8, out)
    return int(np.count_nonzero(put_halves(heads, out)))


@compiled()
def _level(place: np.float32) -> np.float32:
    """Gives the level that is nearest to `place`."""
    level = np.float32(113)
    level = np.float32(89) if place < np.float32(101) else level
    level = np.float32(69) if place < np.float32(79) else level
    level = np.float32(53) if place < np.float32(61) else level
    level = np.float32(38) if place < np.float32(45.5) else level
    level = np.float32(25) if place < np.float32(31.5) else level
    level = np.float32(13) if place < np.float32(19) else level
    level = np.float32(1) if place < np.float32(7) else level
    level = np.float32(-10) if place < np.float32(-4.5) else level
    level = np.float32(-22) if place < np.float32(-16) else level
    level = np.float32(-35) if place < np.float32(-28.5) else level
    level = np.float32(-49) if place < np.float32(-42) else level
    level = np.float32(-65) if place < np.float32(-57) else level
    level = np.float32(-83) if place < np.float32(-74) else level
    level = np.float32(-104) if place < np.float32(-93.5) else level
    return np.float32(-127) if place < np.float32(-115.5) else level


@compiled()
def _code(level: np.float32) -> np.uint8:
    """Gives the number of a level, by how many lie below it."""
    code = np.uint8(0)
    for lower in (-104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113):
        code += np.uint8(level >= np.float32(lower))
    return code


@compiled()
def _sums(tile: Array, weights: Array, inverse: Array, sum_qx: Array, sum_q2: Array) -> None:
    """Sums weight * level * value and weight * level^2 of each lane, where values are divided by a scale."""
    for lane in range(LANES):
        sum_qx[lane] = sum_q2[lane] = _ZERO
    for column in range(COLUMNS):
        for lane in range(LANES):
            value = tile[column, lane]
            level = _level(inverse[lane] * value)
            weighted = weights[column, lane] * level
            sum_qx[lane] += weighted * value
            sum_q2[lane] += weighted * level


@compiled()
def _search_tile(tile: Array, weights: Array, extreme: Array, scales: Array, best: Array, work: Array) -> None:
    """Fills `scales` (64,) with the best of the scales that are tried; `best` (64,) and `work` (3, 64) are scratch."""
    inverse, sum_qx, sum_q2 = work[0], work[1], work[2]
    for step in range(-_TRIES - 1, _TRIES + 1):
        first = step < -_TRIES  # the extreme value's place, found by another way: 1 / (max / 127), not 127 / max
        for lane in range(LANES):
            inverse[lane] = np.divide(np.float32(step) + _LOWEST, extreme[lane])
            if first:
                inverse[lane] = np.divide(_ONE, np.divide(-extreme[lane], _LOWEST))
        _sums(tile, weights, inverse, sum_qx, sum_q2)
        for lane in range(LANES):
            usable = sum_q2[lane] > _ZERO
            if first or (usable and sum_qx[lane] * sum_qx[lane] > best[lane] * sum_q2[lane]):
                scales[lane] = np.divide(sum_qx[lane], sum_q2[lane]) if usable else _ZERO
                best[lane] = scales[lane] * sum_qx[lane]


@compiled()
def _find_scales(blocks: Array, importance: Array, first: int, energy: Array, scales: Array) -> None:
    """Fills `scales` (B,) for `blocks` (B, 32); 0 for those that are all but zero."""
    tile, weights = np.empty((COLUMNS, LANES), np.float32), np.empty((COLUMNS, LANES), np.float32)
    work = np.zeros((7, LANES), np.float32)
    for start in range(0, blocks.shape[0], LANES):
        count = min(LANES, blocks.shape[0] - start)
        gather(blocks, start, tile)
        take(energy, start, work[4])
        weigh(tile, importance, first + start, work[4], weights)
        farthest(tile, work[3])
        _search_tile(tile, weights, work[3], work[5], work[6], work[:3])
        for lane in range(LANES):
            work[5, lane] = _ZERO if abs(work[3, lane]) < TINY else work[5, lane]
        refuse(tile, work[0], work[5])
        for lane in range(count):
            scales[start + lane] = work[5, lane]


@compiled()
def _inverses(scales: Array, inverse: Array) -> None:
    """Fills `inverse` with 1 / scale, and 0 for 0."""
    for block in range(scales.size):
        inverse[block] = np.divide(_ONE, scales[block]) if scales[block] != _ZERO else _ZERO


@compiled()
def _sub_code(place: np.float32) -> int:
    """Rounds the place of a sub-block's scale to a code in [-32, 31]; libggml gives 0 to NaN and -32 to infinities."""
    if np.isnan(place):
        return 0
    return int(rounded(place)) if abs(place) < np.float32(64) else -32


@compiled()
def _common_scales(scales: Array, heads: Array, inverse: Array, out: Array) -> None:
    """Puts the eight scales of each block on one grid of 64, and writes their codes behind the float16.

    Args:
        scales: (B, 8) float32.
        heads: (B,) float32, filled with the step of the grid; NaN where a scale is not a number.
        inverse: (B, 8) float32, filled with 1 / (step * code).
        out: (B, 136) uint8, bytes 2 to 7 are filled.
    """
    for block in range(scales.shape[0]):
        extreme = _ZERO
        for sub in range(_SUBS):
            if abs(scales[block, sub]) > abs(extreme):
                extreme = scales[block, sub]
        step = -extreme / np.float32(32)
        heads[block] = step
        grid = np.divide(_ONE, step) if step != _ZERO else _ZERO
        high, low = 0, 0
        for sub in range(_SUBS):
            if not np.isfinite(scales[block, sub]):
                heads[block] = np.float32(np.nan)
            code = max(-32, min(31, _sub_code(grid * scales[block, sub])))
            scale = step * np.float32(code)
            inverse[block, sub] = np.divide(_ONE, scale) if scale != _ZERO else _ZERO
            high |= (code + 32 >> 4) << 2 * sub
            low |= (code + 32 & 15) << 4 * sub
        for byte in range(2):
            out[block, 2 + byte] = np.uint8(high >> 8 * byte & 255)
        for byte in range(4):
            out[block, 4 + byte] = np.uint8(low >> 8 * byte & 255)


@compiled()
def _encode(blocks: Array, inverse: Array, subs: int, head: int, out: Array) -> None:
    """Writes the codes of `blocks` (B, 32), `subs` of them to a row of `out`, behind `head` bytes."""
    tile = np.empty((COLUMNS, LANES), np.float32)
    codes = np.empty((COLUMNS, LANES), np.uint8)
    scale = np.zeros(LANES, np.float32)
    for start in range(0, blocks.shape[0], LANES):
        count = min(LANES, blocks.shape[0] - start)
        gather(blocks, start, tile)
        take(inverse, start, scale)
        for column in range(COLUMNS):
            for lane in range(LANES):
                codes[column, lane] = _code(_level(scale[lane] * tile[column, lane]))
        for lane in range(count):
            row, sub = (start + lane) // subs, (start + lane) % subs
            put_nibbles(codes, lane, out[row, head + 16 * sub : head + 16 * sub + 16])
