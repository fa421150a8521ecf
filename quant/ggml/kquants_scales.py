"""Scales of scales: how the sub-blocks' scales are stored, for sixteen blocks side by side, compiled by numba.

Sources: as `kquants`; make_qp_quants in llama.cpp's ggml-quants.c. Tiles: see `kquants_lanes`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.kquants_lanes import ROUNDS, TINY, clamped
from quantpress.quant.lane_bits import nearest, take_bits
from quantpress.quant.lanes import LANES, Vector, absolute, both, load, part, select, set_lanes, splat, store

__all__ = [
    "cap",
    "clear_small",
    "scales_by_greatest",
    "scales_by_search",
    "signed_bytes_by_farthest",
    "signed_scales_by_farthest",
]

Array = NDArray[Any]

_SIGNED: Final = 16  # sub-blocks of Q3_K and Q6_K
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)


@part
def scales_by_search(values: Array, weights: Array, size: int, tried: Array, codes: Array) -> Vector:
    """make_qp_quants: the step of scales (or minima), and codes for them that are stored as bytes.

    Args:
        values: tile of `size` rows.
        weights: tile of what their errors cost.
        size: sub-blocks of a block.
        tried: as in `search_with_minimum`, divided by the greatest of the values.
        codes: tile of `size` rows; written.
    """
    zero, top = splat(_ZERO), splat(tried[0])
    greatest = zero
    for row in range(size):
        value = load(values, row * LANES)
        greatest = select(greatest > value, greatest, value)
    chosen = top / greatest
    best = zero
    for step in range(tried.size):
        inverse = splat(tried[step]) / greatest
        scale, error = splat(_ONE) / inverse, zero
        for row in range(size):
            value = load(values, row * LANES)
            code = nearest(inverse * value)
            code = take_bits(code, 0, 255) if step == 0 else select(code > top, top, code)
            off = value - scale * code
            error = error + load(weights, row * LANES) * off * off
        if step == 0:
            best = error
        else:
            better = error < best
            best, chosen = select(better, error, best), select(better, inverse, chosen)
    sum_lx, sum_l2 = zero, zero
    for row in range(size):
        value, weight = load(values, row * LANES), load(weights, row * LANES)
        code = nearest(chosen * value)
        code = select(code > top, top, code)
        store(codes, row * LANES, take_bits(code, 0, 255))
        sum_lx = sum_lx + weight * value * code
        sum_l2 = sum_l2 + weight * code * code
    for _ in range(ROUNDS):
        moved = 0
        for row in range(size):
            value, weight, code = load(values, row * LANES), load(weights, row * LANES), load(codes, row * LANES)
            rest_lx, rest_l2 = sum_lx - weight * value * code, sum_l2 - weight * code * code
            other = nearest(value * rest_l2 / rest_lx)
            other = select(other > top, top, other)
            new_lx, new_l2 = rest_lx + weight * value * other, rest_l2 + weight * other * other
            better = both(both(rest_lx > zero, rest_l2 > zero), other != code)
            better = both(better, new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            store(codes, row * LANES, select(better, take_bits(other, 0, 255), code))
            sum_lx, sum_l2 = select(better, new_lx, sum_lx), select(better, new_l2, sum_l2)
            moved |= set_lanes(better)
        if moved == 0:
            break
    nothing = greatest < splat(TINY)
    for row in range(size):
        store(codes, row * LANES, select(nothing, zero, load(codes, row * LANES)))
    usable = both(sum_l2 > zero, greatest >= splat(TINY))
    return select(usable, sum_lx / sum_l2, zero)


@part
def scales_by_greatest(values: Array, count: int, top: np.float32, codes: Array) -> Vector:
    """The step that makes the greatest scale (or minimum) `top`, and codes for it that are stored as bytes."""
    greatest = splat(_ZERO)
    for row in range(count):
        value = load(values, row * LANES)
        greatest = select(value > greatest, value, greatest)
    some = greatest > splat(_ZERO)
    inverse = select(some, splat(top) / greatest, splat(_ZERO))
    for row in range(count):
        store(codes, row * LANES, take_bits(nearest(inverse * load(values, row * LANES)), 0, 255))
    return greatest / splat(top)


@part
def cap(codes: Array, count: int, top: np.float32) -> None:
    """Bounds codes from above."""
    for row in range(count):
        code = load(codes, row * LANES)
        store(codes, row * LANES, select(code > splat(top), splat(top), code))


@part
def _farthest_scale(scales: Array) -> Vector:
    greatest, found = splat(_ZERO), splat(_ZERO)
    for row in range(_SIGNED):
        scale = load(scales, row * LANES)
        farther = absolute(scale) > greatest
        greatest, found = select(farther, absolute(scale), greatest), select(farther, scale, found)
    return found


@part
def signed_scales_by_farthest(scales: Array, top: np.float32, codes: Array) -> Vector:
    """The step that makes the farthest scale -top, and codes for it from 0 (which is -top)."""
    extreme = _farthest_scale(scales)
    inverse = splat(-top) / extreme
    some = extreme != splat(_ZERO)
    for row in range(_SIGNED):
        code = nearest(inverse * load(scales, row * LANES))
        code = clamped(code, splat(-top), splat(top - _ONE)) + splat(top)
        store(codes, row * LANES, select(some, code, splat(_ZERO)))
    return select(some, splat(_ONE) / inverse, splat(_ZERO))


@part
def signed_bytes_by_farthest(scales: Array, codes: Array) -> Vector:
    """The step that makes the farthest scale -128, and codes for it, at most 127."""
    inverse = splat(np.float32(-128)) / _farthest_scale(scales)
    for row in range(_SIGNED):
        code = nearest(inverse * load(scales, row * LANES))
        store(codes, row * LANES, select(code > splat(np.float32(127)), splat(np.float32(127)), code))
    return splat(_ONE) / inverse


@part
def clear_small(packed: Array, scales: Array) -> None:
    """Zeros for blocks of Q6_K whose scales are all next to 0."""
    nothing = absolute(_farthest_scale(scales)) < splat(TINY)
    if set_lanes(nothing):
        for row in range(packed.size // LANES):
            store(packed, row * LANES, select(nothing, splat(_ZERO), load(packed, row * LANES)))
