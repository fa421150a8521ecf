"""libggml's search for IQ4_NL and IQ4_XS: scales of sub-blocks of 32, of super-blocks of 8 of these, and codes.

A lane keeps a sub-block in registers and adds from the first weight to the last, as quantize_row_iq4_nl_impl does
(llama.cpp's ggml-quants.c); layouts: block_iq4_nl and block_iq4_xs in ggml-common.h. A weight takes the nearest of 16
levels: the C code looks for it by halves and compares two distances, which are exact near the middle of two levels, so
the level is that of the last threshold that is not above the weight. Thresholds are halves of whole numbers.

`work` is (2, sub-blocks) float32: scale, and the factor that turns weights into units of the levels.
"""

# Triton functions have no types, their tuples grow, and starred elements are not compiled.
# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator,var-annotated"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from quantpress.kernels.kquants.search import farthest, load_values, load_weights, nearest, store_half

__all__ = ["pack_levels", "scale_super_blocks", "search_levels"]

_TINY = tl.constexpr(1e-15)  # GROUP_MAX_EPS of ggml-quants.c
_LEVELS = tl.constexpr(
    (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
)


@triton.jit
def _level(values):
    """The nearest level; of two equally near ones the greater, and the greatest for NaN."""
    found = tl.full(values.shape, _LEVELS[0], tl.float32)
    for index in tl.static_range(1, 16):
        found = tl.where(values < 0.5 * (_LEVELS[index - 1] + _LEVELS[index]), found, _LEVELS[index])
    return found


@triton.jit
def _index(values):
    """The number of the nearest level, as `_level`."""
    found = tl.full(values.shape, 0, tl.int32)
    for index in tl.static_range(1, 16):
        found = tl.where(values < 0.5 * (_LEVELS[index - 1] + _LEVELS[index]), found, index)
    return found


@triton.jit
def search_levels(
    values, importance, squares, work, blocks, total, columns, whole: tl.constexpr, weighted: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Scales of sub-blocks; `whole`: they are blocks of IQ4_NL, whose steps are stored, and all that is needed."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    sub = tl.minimum(lane, total - 1)
    value = load_values(values, sub * 32, 32)
    if weighted:
        if whole:
            shared = tl.zeros((block,), tl.float32)
            for index in tl.static_range(32):
                shared = shared + value[index] * value[index]
            shared = shared * 0.0625
        else:
            shared = tl.load(squares + sub // 8)
        weight = load_weights(value, importance, sub * 32, columns, shared, 32, False)
    else:
        weight = ()
        for index in tl.static_range(32):
            weight = weight + (value[index] * value[index],)
    scale = _fit(value, weight)
    inside = lane < total
    tl.store(work + lane, scale, mask=inside)
    if whole:
        tl.store(work + total + lane, _inverse(scale), mask=inside)
        store_half(blocks + sub * 18, scale, inside)


@triton.jit
def _fit(value, weight):
    """The scale of a sub-block, 0 where there is nothing in it."""
    extreme = farthest(value, 32)
    one = tl.full(extreme.shape, 1.0, tl.float32)
    scale = tl.zeros_like(extreme)
    best = scale
    inverse = tl.div_rn(one, tl.div_rn(-extreme, -127.0 * one))
    end = -134.0 * one
    for number in range(16):  # the C code's first, which it takes where it is one, and its 15 others
        sum_qx, sum_q2 = _sums(value, weight, inverse)
        better = (sum_q2 > 0.0) & ((number == 0) | (sum_qx * sum_qx > best * sum_q2))
        found = tl.div_rn(sum_qx, sum_q2)
        scale = tl.where(better, found, scale)
        best = tl.where(better, found * sum_qx, best)
        inverse = tl.div_rn(end, extreme)
        end += 1.0
    return tl.where(tl.abs(extreme) < _TINY, 0.0, scale)


@triton.jit
def _sums(value, weight, inverse):
    sum_qx = tl.zeros_like(inverse)
    sum_q2 = tl.zeros_like(inverse)
    for index in tl.static_range(32):
        level = _level(inverse * value[index])
        product = weight[index] * level
        sum_qx += product * value[index]
        sum_q2 += product * level
    return sum_qx, sum_q2


@triton.jit
def _inverse(scale):
    one = tl.full(scale.shape, 1.0, tl.float32)
    return tl.where(scale == 0.0, 0.0, tl.div_rn(one, tl.where(scale == 0.0, one, scale)))


@triton.jit
def scale_super_blocks(work, blocks, total, supers, block: tl.constexpr):
    """IQ4_XS: step of a super-block and the six-bit scales of its sub-blocks, one lane for each."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = lane < supers
    place = tl.minimum(lane, supers - 1)
    scale = load_values(work, place * 8, 8)
    extreme = farthest(scale, 8)
    step = -extreme * 0.03125
    inverse = _inverse(step)
    start = blocks + place * 136
    store_half(start, step, inside)
    high = tl.zeros((block,), tl.int32)
    low = tl.zeros((block,), tl.int32)
    for index in tl.static_range(8):
        code = tl.minimum(tl.maximum(nearest(inverse * scale[index]), -32), 31)
        tl.store(work + total + place * 8 + index, _inverse(step * code.to(tl.float32)), mask=inside)
        low |= ((code + 32) & 15) << (4 * index)
        high |= ((code + 32) >> 4) << (2 * index)
    for index in tl.static_range(2):
        tl.store(start + 2 + index, ((high >> (8 * index)) & 255).to(tl.uint8), mask=inside)
    for index in tl.static_range(4):
        tl.store(start + 4 + index, ((low >> (8 * index)) & 255).to(tl.uint8), mask=inside)


@triton.jit
def pack_levels(values, work, blocks, total, whole: tl.constexpr, block: tl.constexpr):
    """Fills in the codes, one lane for each byte: two weights that lie 16 apart."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    sub = lane // 16
    place = lane % 16
    inside = sub < total
    factor = tl.load(work + total + sub, mask=inside, other=0.0)
    start = values + sub * 32 + place
    low = _index(factor * tl.load(start, mask=inside, other=0.0).to(tl.float32))
    high = _index(factor * tl.load(start + 16, mask=inside, other=0.0).to(tl.float32))
    target = sub * 18 + 2 + place if whole else sub // 8 * 136 + 8 + sub % 8 * 16 + place
    tl.store(blocks + target, (low | (high << 4)).to(tl.uint8), mask=inside)
