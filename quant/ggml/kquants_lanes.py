"""The searches that K-quants are made of, for sixteen blocks side by side, compiled by numba.

Sources: make_qkx2_quants, make_qkx3_quants, make_qp_quants, make_qx_quants and make_q3_quants in llama.cpp's
ggml-quants.c, operation for operation: every lane has libggml's bits. A tile is a flat float32 array of rows of sixteen
lanes, row r from index 16 * r; codes are whole numbers in it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.kquants_tiles import Tiles
from quantpress.quant.lane_bits import nearest
from quantpress.quant.lanes import (
    LANES,
    Vector,
    absolute,
    both,
    load,
    part,
    round_small,
    select,
    set_lanes,
    splat,
    store,
)

__all__ = ["ROUNDS", "TINY", "clamped", "improve_signed", "search_signed", "search_with_minimum"]

Array = NDArray[Any]

TINY: Final = np.float32(1e-15)  # GROUP_MAX_EPS: what stays below is stored as zero
_SIGNED: Final = 16  # weights of a sub-block of types without a minimum
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
ROUNDS: Final = 5  # over the codes of a sub-block, at most


@part
def clamped(value: Vector, low: Vector, high: Vector) -> Vector:
    """The value, or the bound beyond which it is."""
    value = select(value < low, low, value)
    return select(value > high, high, value)


@part
def _place(value: Vector, minimum: Vector, inverse: Vector, top: Vector) -> Vector:
    """The code of a weight: its place above the minimum in steps, rounded after it is bounded."""
    place = inverse * (value - minimum)
    place = select(place > splat(_ZERO), place, splat(_ZERO))
    return round_small(select(place > top, top, place))


@part
def _distance(values: Array, weights: Array, base: int, work: Array, size: int, scale: Vector, minimum: Vector,
              by_size: bool) -> Vector:  # fmt: skip
    """Sums weighted squared differences, or weighted sizes of them; codes are in `work`."""
    total = splat(_ZERO)
    if by_size:
        for row in range(size):
            off = scale * load(work, row * LANES) + minimum - load(values, (base + row) * LANES)
            total = total + load(weights, (base + row) * LANES) * absolute(off)
    else:
        for row in range(size):
            off = scale * load(work, row * LANES) + minimum - load(values, (base + row) * LANES)
            total = total + load(weights, (base + row) * LANES) * (off * off)
    return total


@part
def search_with_minimum(tiles: Tiles, number: int, size: int, tried: Array, by_size: bool) -> None:
    """make_qkx2_quants and make_qkx3_quants: scale and subtrahend of a sub-block, and codes for them.

    Places are bounded before they are rounded, libggml's after it. That differs for places beyond 2^22 only: where the
    range is subnormal, but there the determinant of the fit underflows and no step is taken; and where steps that are
    taken shrink the range by 2^17, which needs an importance of 0 nearly everywhere and was never seen.

    Args:
        tiles: values and weights are read; a row of scales and of minima is written, and `size` rows of codes.
        number: of the sub-block.
        size: weights of it.
        tried: as in `kquants_blocks.Recipe`.
        by_size: errors count by their size, not their square.
    """
    values, weights, work, base = tiles.values, tiles.weights, tiles.work, number * size
    zero, top = splat(_ZERO), splat(tried[0])
    value, weight = load(values, base * LANES), load(weights, base * LANES)
    least, high, sum_w, sum_x = value, value, weight, weight * value
    for row in range(base + 1, base + size):
        value, weight = load(values, row * LANES), load(weights, row * LANES)
        least, high = select(value < least, value, least), select(value > high, value, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * value
    minimum = select(least > zero, zero, least)
    flat, first = high == minimum, minimum
    inverse = top / (high - minimum)
    scale, best = splat(_ONE) / inverse, zero
    # of an infinite inverse libggml's first codes are 0: the bits of infinity say a number far below
    chosen = select(inverse < splat(np.float32(np.inf)), inverse, zero)
    chosen_minimum = minimum
    for step in range(tried.size):
        inverse = splat(tried[step]) / (high - minimum)
        if step == 0:
            inverse = chosen
        sum_l, sum_l2, sum_xl = zero, zero, zero
        for row in range(size):
            value = load(values, (base + row) * LANES)
            code = _place(value, minimum, inverse, top)
            store(work, row * LANES, code)
            cost = load(weights, (base + row) * LANES) * code
            sum_l = sum_l + cost
            sum_l2 = sum_l2 + cost * code
            sum_xl = sum_xl + cost * value
        if step == 0:
            best = _distance(values, weights, base, work, size, scale, minimum, by_size)
            continue
        divisor = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        new_scale = select(new_minimum > zero, sum_xl / sum_l2, new_scale)
        new_minimum = select(new_minimum > zero, zero, new_minimum)
        error = _distance(values, weights, base, work, size, new_scale, new_minimum, by_size)
        better = both(divisor > zero, error < best)
        best, scale = select(better, error, best), select(better, new_scale, scale)
        chosen, chosen_minimum = select(better, inverse, chosen), select(better, minimum, chosen_minimum)
        minimum = select(better, new_minimum, minimum)
    for row in range(size):
        value = load(values, (base + row) * LANES)
        code = _place(value, chosen_minimum, chosen, top)
        store(tiles.codes, (base + row) * LANES, select(flat, zero, code))
    store(tiles.scales, number * LANES, select(flat, zero, scale))
    store(tiles.minima, number * LANES, select(flat, first, minimum) * splat(-_ONE))


@part
def _farthest(values: Array, base: int, size: int) -> Vector:
    """The value farthest from 0, the first of several."""
    greatest, found = splat(_ZERO), splat(_ZERO)
    for row in range(base, base + size):
        value = load(values, row * LANES)
        farther = absolute(value) > greatest
        greatest, found = select(farther, absolute(value), greatest), select(farther, value, found)
    return found


@part
def search_signed(values: Array, weights: Array, number: int, tried: Array, work: Array, codes: Array,
                  scales: Array) -> None:  # fmt: skip
    """make_qx_quants: a scale for sixteen weights, and codes from 0 of which `tried[0]` stands for 0.

    Args:
        values: tile of weights.
        weights: tile of what their errors cost.
        number: of the sub-block.
        tried: as in `kquants_blocks.Recipe`.
        work: tile of 16 rows.
        codes: tile; rows of the sub-block are written.
        scales: tile; row `number` is written.
    """
    base, size = number * _SIGNED, _SIGNED
    zero, top = splat(_ZERO), splat(tried[0])
    least, greatest = zero - top, top - splat(_ONE)
    extreme = _farthest(values, base, size)
    for row in range(size):
        store(work, row * LANES, load(weights, (base + row) * LANES) * load(values, (base + row) * LANES))
    scale, best, chosen = zero, zero, zero
    for step in range(tried.size):
        inverse = splat(-tried[step]) / extreme
        sum_lx, sum_l2 = zero, zero
        for row in range(base, base + size):
            code = clamped(round_small(inverse * load(values, row * LANES)), least, greatest)
            sum_lx = sum_lx + load(work, (row - base) * LANES) * code
            sum_l2 = sum_l2 + load(weights, row * LANES) * code * code
        found = sum_lx / sum_l2
        if step == 0:
            scale = select(sum_l2 != zero, found, zero)
            best, chosen = scale * sum_lx, inverse
        else:
            better = both(sum_l2 > zero, sum_lx * sum_lx > best * sum_l2)
            scale, best = select(better, found, scale), select(better, found * sum_lx, best)
            chosen = select(better, inverse, chosen)
    nothing = absolute(extreme) < splat(TINY)
    for row in range(base, base + size):
        code = clamped(round_small(chosen * load(values, row * LANES)), least, greatest) + top
        store(codes, row * LANES, select(nothing, zero, code))
    store(scales, number * LANES, select(nothing, zero, scale))


@part
def improve_signed(tiles: Tiles, number: int, top: np.float32) -> None:
    """make_q3_quants: codes move one at a time as long as that helps; results as of `search_signed`."""
    values, weights, codes, base, size = tiles.values, tiles.weights, tiles.codes, number * _SIGNED, _SIGNED
    zero, middle = splat(_ZERO), splat(top)
    least, greatest = zero - middle, middle - splat(_ONE)
    extreme = _farthest(values, base, size)
    inverse = least / extreme
    sum_lx, sum_l2 = zero, zero
    for row in range(base, base + size):
        value, weight = load(values, row * LANES), load(weights, row * LANES)
        code = clamped(round_small(inverse * value), least, greatest)
        store(codes, row * LANES, code)
        sum_lx = sum_lx + weight * value * code
        sum_l2 = sum_l2 + weight * code * code
    for _ in range(ROUNDS):
        moved = 0
        for row in range(base, base + size):
            value, weight, code = load(values, row * LANES), load(weights, row * LANES), load(codes, row * LANES)
            rest_lx, rest_l2 = sum_lx - weight * value * code, sum_l2 - weight * code * code
            other = clamped(nearest(value * rest_l2 / rest_lx), least, greatest)
            new_lx, new_l2 = rest_lx + weight * value * other, rest_l2 + weight * other * other
            better = both(both(rest_lx > zero, new_l2 > zero), other != code)
            better = both(better, new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            store(codes, row * LANES, select(better, other, code))
            sum_lx, sum_l2 = select(better, new_lx, sum_lx), select(better, new_l2, sum_l2)
            moved |= set_lanes(better)
        if moved == 0:
            break
    nothing = absolute(extreme) < splat(TINY)
    for row in range(base, base + size):
        store(codes, row * LANES, select(nothing, zero, load(codes, row * LANES) + middle))
    usable = both(sum_l2 > zero, absolute(extreme) >= splat(TINY))
    store(tiles.scales, number * LANES, select(usable, sum_lx / sum_l2, zero))
