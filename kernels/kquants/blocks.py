"""Scales of the sub-blocks of K-quants: one lane for each sub-block, its weights in registers.

What a kernel finds goes into `work`, (5, sub-blocks) float32: scale, minimum, sum of the weights, and two numbers that
give back the codes of the search, which a file holds where the scale is stored as 0: code = clamp(round(factor *
(value - offset))), or for `search_q3` 16 codes of 4 bits.
"""

# Triton functions have no types, their tuples grow, and starred elements are not compiled.
# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator,var-annotated"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from quantpress.kernels.kquants.search import (
    farthest,
    improve,
    load_four,
    load_values,
    load_weights,
    nearest,
    ordered_sum,
    search_signed,
)  # fmt: skip

__all__ = ["fit_minimum", "mean_squares", "search_minimum", "search_q3", "search_scale"]

_MAGIC = tl.constexpr(12582912.0)
_TINY = tl.constexpr(1e-15)


@triton.jit
def mean_squares(values, target, total, factor: tl.constexpr, block: tl.constexpr):
    """Mean square of super-blocks, times 1 or 2: the part of a weight that neighbours share. One lane for each."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    place = tl.minimum(lane, total - 1) * 256
    found = tl.zeros((block,), tl.float32)
    for start in range(0, 256, 32):
        for inner in tl.static_range(0, 32, 4):
            first, second, third, fourth = load_four(values, place + start + inner)
            found = found + first * first
            found = found + second * second
            found = found + third * third
            found = found + fourth * fourth
    tl.store(target + lane, factor * found * 0.00390625, mask=lane < total)


@triton.jit
def search_minimum(
    values, importance, squares, work, total, columns, size: tl.constexpr, top: tl.constexpr, first: tl.constexpr,
    delta: tl.constexpr, last: tl.constexpr, absolute: tl.constexpr, weighted: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """make_qkx2_quants, or make_qkx3_quants if `weighted`."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    sub = tl.minimum(lane, total - 1)
    value = load_values(values, sub * size, size)
    if weighted:
        shared = tl.load(squares + sub // (256 // size))
        weight = load_weights(value, importance, sub * size, columns, shared, size, False)
    else:
        weight = _plain_weights(value, size)
    scale, minimum, factor, offset = fit_minimum(value, weight, size, top, first, delta, last, absolute, weighted)
    inside = lane < total
    tl.store(work + lane, scale, mask=inside)
    tl.store(work + total + lane, -minimum, mask=inside)
    if weighted:
        tl.store(work + 2 * total + lane, ordered_sum(weight, size), mask=inside)
    tl.store(work + 3 * total + lane, factor, mask=inside)
    tl.store(work + 4 * total + lane, offset, mask=inside)


@triton.jit
def _plain_weights(value, size: tl.constexpr):
    weight = ()
    if size == 16:
        for index in tl.static_range(size):
            weight = weight + (tl.abs(value[index]),)
    else:
        square = value[0] * value[0]
        for index in tl.static_range(1, size):
            square = square + value[index] * value[index]
        root = tl.sqrt_rn(square * (1.0 / size))
        for index in tl.static_range(size):
            weight = weight + (root + tl.abs(value[index]),)
    return weight


@triton.jit
def fit_minimum(
    value, weight, size: tl.constexpr, top: tl.constexpr, first: tl.constexpr, delta: tl.constexpr,
    last: tl.constexpr, absolute: tl.constexpr, bounded: tl.constexpr,
):  # fmt: skip
    """make_qkx2_quants, or make_qkx3_quants if `bounded`: scale * code + minimum for each lane's `size` weights.

    Returns:
        Scale, minimum, and factor and offset of the codes that they were fitted to.
    """
    minimum = value[0]
    highest = value[0]
    sum_w = weight[0]
    sum_x = weight[0] * value[0]
    for index in tl.static_range(1, size):
        minimum = tl.where(value[index] < minimum, value[index], minimum)  # of two zeros the first, with its sign
        highest = tl.maximum(highest, value[index])
        sum_w += weight[index]
        sum_x += weight[index] * value[index]
    minimum = tl.where(minimum > 0.0, 0.0, minimum)
    flat = highest == minimum
    factor = tl.div_rn(tl.full(highest.shape, top, tl.float32), highest - minimum)
    scale = tl.where(flat, 0.0, tl.div_rn(tl.full(highest.shape, 1.0, tl.float32), factor))
    factor = tl.where(flat, 0.0, factor)
    offset = minimum
    best = _distance(value, weight, _codes(value, factor, minimum, size, top), scale, minimum, size, absolute)
    step = tl.zeros_like(highest)
    for _ in range(last + 1):
        inverse = tl.div_rn(delta * step + first + top, highest - minimum)
        code = _codes(value, inverse, minimum, size, top)
        divisor, new_scale, new_minimum = _line(value, weight, code, sum_w, sum_x, size)
        error = _distance(value, weight, code, new_scale, new_minimum, size, absolute)
        better = (divisor > 0.0) & (error < best)  # not if all weights are one number: all codes are 0
        if not bounded:
            # the C code's codes are all 0 then, and 0 is no fit
            better = better & (tl.abs(inverse) < float("inf"))
        best = tl.where(better, error, best)
        scale = tl.where(better, new_scale, scale)
        factor = tl.where(better, inverse, factor)
        offset = tl.where(better, minimum, offset)
        minimum = tl.where(better, new_minimum, minimum)
        step += 1.0
    return scale, minimum, factor, offset


@triton.jit
def _line(value, weight, code, sum_w, sum_x, size: tl.constexpr):
    """Least squares of scale * code + minimum, the minimum not above 0; there is no solution where the divisor is 0."""
    sum_l = tl.zeros_like(sum_w)
    sum_l2 = tl.zeros_like(sum_w)
    sum_xl = tl.zeros_like(sum_w)
    for index in tl.static_range(size):
        product = weight[index] * code[index]
        sum_l += product
        sum_l2 += product * code[index]
        sum_xl += product * value[index]
    divisor = sum_w * sum_l2 - sum_l * sum_l
    scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, divisor)
    minimum = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, divisor)
    positive = minimum > 0.0
    scale = tl.where(positive, tl.div_rn(sum_xl, sum_l2), scale)
    return divisor, scale, tl.where(positive, 0.0, minimum)


@triton.jit
def _codes(value, factor, minimum, size: tl.constexpr, top: tl.constexpr):
    code = ()
    for index in tl.static_range(size):
        # bounds are whole numbers: it is the same to clamp before rounding; a maximum with NaN is the other number
        bounded = tl.minimum(tl.maximum(factor * (value[index] - minimum), 0.0), top)
        code = code + ((bounded + _MAGIC) - _MAGIC,)
    return code


@triton.jit
def _distance(value, weight, code, scale, minimum, size: tl.constexpr, absolute: tl.constexpr):
    error = tl.zeros_like(scale)
    for index in tl.static_range(size):
        off = scale * code[index] + minimum - value[index]
        if absolute:
            error += weight[index] * tl.abs(off)
        else:
            error += weight[index] * (off * off)
    return error


@triton.jit
def search_scale(
    values, importance, squares, work, total, columns, top: tl.constexpr, shared: tl.constexpr,
    weighted: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """make_qx_quants for sub-blocks of 16; `shared`: weights with importance have the super-block's mean square."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    sub = tl.minimum(lane, total - 1)
    value = load_values(values, sub * 16, 16)
    if weighted:
        square = tl.zeros((block,), tl.float32)
        if shared:
            square = tl.load(squares + sub // 16)
        weight = load_weights(value, importance, sub * 16, columns, square, 16, not shared)
    else:
        weight = ()
        for index in tl.static_range(16):
            weight = weight + (value[index] * value[index],)
    scale, factor = search_signed(value, weight, 16, top)
    inside = lane < total
    tl.store(work + lane, scale, mask=inside)
    tl.store(work + 2 * total + lane, ordered_sum(weight, 16), mask=inside)
    tl.store(work + 3 * total + lane, factor, mask=inside)


@triton.jit
def search_q3(values, work, total, block: tl.constexpr):
    """make_q3_quants for sub-blocks of 16, with rmse."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    sub = tl.minimum(lane, total - 1)
    value = load_values(values, sub * 16, 16)
    extreme = farthest(value, 16)
    factor = tl.div_rn(tl.full((block,), -4.0, tl.float32), extreme)
    weight = ()
    code = ()
    sum_lx = tl.zeros((block,), tl.float32)
    sum_l2 = tl.zeros((block,), tl.float32)
    for index in tl.static_range(16):
        weight = weight + (value[index] * value[index],)
        code = code + (tl.minimum(tl.maximum(nearest(factor * value[index]), -4), 3),)
        number = code[index].to(tl.float32)
        sum_lx += weight[index] * value[index] * number
        sum_l2 += weight[index] * number * number
    # a round that moves nothing is followed by others that move nothing
    for _ in range(5):
        code, sum_lx, sum_l2 = improve(value, weight, code, sum_lx, sum_l2, 16, -4, 3, True)
    nothing = tl.abs(extreme) < _TINY
    inside = lane < total
    tl.store(work + lane, tl.where(nothing | ~(sum_l2 > 0.0), 0.0, tl.div_rn(sum_lx, sum_l2)), mask=inside)
    for half in tl.static_range(2):
        word = tl.zeros((block,), tl.int32)
        for index in tl.static_range(8):
            word |= (code[8 * half + index] + 4) << (4 * index)
        word = tl.where(nothing, 0, word)
        tl.store(work + (3 + half) * total + lane, word.to(tl.float32, bitcast=True), mask=inside)
