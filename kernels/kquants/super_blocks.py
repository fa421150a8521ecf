"""Scales of super-blocks: the scales (and minima) of their sub-blocks, rounded to a grid of their own and stored.

One lane for each super-block of `count` sub-blocks. `work` is that of kquants_blocks; scale and minimum of a sub-block
are replaced by what a reader will multiply and subtract. Scale bytes and float16 steps go into the blocks, (blocks,
bytes of a block) uint8; layouts: block_q*_K in llama.cpp's ggml-common.h.
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
    load_values,
    nearest,
    search_signed,
    store_half,
    store_values,
)

__all__ = ["scales_with_minimum", "signed_scales"]

_TINY = tl.constexpr(1e-15)


@triton.jit
def scales_with_minimum(
    work, blocks, total, supers, count: tl.constexpr, top: tl.constexpr, bounded: tl.constexpr,
    weighted: tl.constexpr, block_bytes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Q2_K (16 sub-blocks), Q4_K and Q5_K (8); `bounded`: codes stay below top, whatever the scales are."""
    # two lanes for each super-block, one for the scales and one for the minima, which are fitted alike
    pair = tl.arange(0, 2 * block)
    owner = tl.minimum(tl.program_id(0).to(tl.int64) * block + pair // 2, supers - 1)
    value = load_values(work, pair % 2 * total + owner * count, count)
    if weighted:
        both_steps, both = _fit_scales(value, load_values(work + 2 * total, owner * count, count), count, top)
    else:
        both_steps, both = _largest_to_top(value, count, top)
    code = ()
    offset_code = ()
    for index in tl.static_range(count):
        one, other = tl.split(tl.reshape(both[index], (block, 2)))
        code = code + (one,)
        offset_code = offset_code + (other,)
    step, offset_step = tl.split(tl.reshape(both_steps, (block, 2)))
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = lane < supers
    place = tl.minimum(lane, supers - 1)
    start = place * block_bytes
    if count == 16:
        code, offset_code = _store_nibbles(blocks, start, code, offset_code, inside)
        step = store_half(blocks + start + 80, step, inside)
        offset_step = store_half(blocks + start + 82, offset_step, inside)
    else:
        code, offset_code = _store_six_bits(blocks, start + 4, code, offset_code, inside, bounded)
        step = store_half(blocks + start, step, inside)
        offset_step = store_half(blocks + start + 2, offset_step, inside)
    _store_products(work, place * count, step, code, inside, count)
    _store_products(work + total, place * count, offset_step, offset_code, inside, count)


@triton.jit
def signed_scales(
    work, blocks, total, supers, six: tl.constexpr, weighted: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Q6_K (`six`) and Q3_K: 16 sub-blocks without minima."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = lane < supers
    place = tl.minimum(lane, supers - 1)
    scale = load_values(work, place * 16, 16)
    if six:
        step, code = _farthest_to_end(scale, -128, 127, _TINY)
        # a block of zeros has no codes of a search either
        empty = inside & ~(tl.abs(farthest(scale, 16)) >= _TINY)
        for index in tl.static_range(4):
            four = place[:, None] * 16 + 4 * index + tl.arange(0, 4)[None, :]
            tl.store(work + 3 * total + four, float("inf"), mask=empty[:, None])
        store_values(blocks, place * 210 + 192, code, inside, 16)
        step = store_half(blocks + place * 210 + 208, step, inside)
    else:
        if weighted:
            weight = load_values(work + 2 * total, place * 16, 16)
            step, factor = search_signed(scale, weight, 16, 32)
            code = ()
            for index in tl.static_range(16):
                number = tl.minimum(tl.maximum(nearest(factor * scale[index]), -32), 31)
                code = code + (tl.where(factor == float("inf"), -32, number),)
        else:
            step, code = _farthest_to_end(scale, -32, 31, 0.0)
        _store_q3_scales(blocks, place * 110 + 96, code, inside)
        step = store_half(blocks + place * 110 + 108, step, inside)
    _store_products(work, place * 16, step, code, inside, 16)


@triton.jit
def _largest_to_top(values, count: tl.constexpr, top: tl.constexpr):
    """Step and codes (bytes) that give the greatest value the greatest code."""
    greatest = tl.zeros_like(values[0])
    for index in tl.static_range(count):
        greatest = tl.maximum(greatest, values[index])
    positive = greatest > 0.0
    inverse = tl.div_rn(tl.full(greatest.shape, top, tl.float32), tl.where(positive, greatest, 1.0))
    code = ()
    for index in tl.static_range(count):
        code = code + (tl.where(positive, nearest(inverse * values[index]) & 255, 0),)
    return tl.where(positive, tl.div_rn(greatest, tl.full(greatest.shape, top, tl.float32)), 0.0), code


@triton.jit
def _farthest_to_end(values, end: tl.constexpr, high: tl.constexpr, least: tl.constexpr):
    """Step and signed codes of 16 values; the value farthest from 0 gets the code `end`."""
    extreme = farthest(values, 16)
    some = (tl.abs(extreme) >= least) & (extreme != 0.0)
    inverse = tl.div_rn(tl.full(extreme.shape, end, tl.float32), tl.where(some, extreme, 1.0))
    code = ()
    for index in tl.static_range(16):
        number = tl.minimum(nearest(inverse * values[index]), high)
        # where there is nothing all bytes are 0: the stored code is 0 (Q6_K), or end + 32 is
        code = code + (tl.where(some, tl.maximum(number, end), end + 128 if high == 127 else end),)
    one = tl.full(extreme.shape, 1.0, tl.float32)
    return tl.where(some, tl.div_rn(one, inverse), 0.0), code


@triton.jit
def _fit_scales(values, weight, count: tl.constexpr, top: tl.constexpr):
    """make_qp_quants: step and codes (bytes)."""
    greatest = tl.zeros_like(values[0])
    for index in tl.static_range(count):
        greatest = tl.maximum(greatest, values[index])
    nothing = greatest < _TINY
    greatest = tl.where(nothing, 1.0, greatest)
    one = tl.full(greatest.shape, 1.0, tl.float32)
    chosen = tl.div_rn(one * top, greatest)
    best = _scale_error(values, weight, chosen, count, 255)
    step = -4.0 * one
    for _ in range(9):
        inverse = tl.div_rn(0.1 * step + top, greatest)
        error = _scale_error(values, weight, inverse, count, top)
        better = (error < best) & (step != 0.0)  # that was the first
        best = tl.where(better, error, best)
        chosen = tl.where(better, inverse, chosen)
        step += 1.0
    sum_lx = tl.zeros_like(one)
    sum_l2 = tl.zeros_like(one)
    code = ()
    for index in tl.static_range(count):
        found = tl.minimum(nearest(chosen * values[index]), top)
        number = found.to(tl.float32)
        sum_lx += weight[index] * values[index] * number
        sum_l2 += weight[index] * number * number
        code = code + (found & 255,)
    for _ in range(5):
        code, sum_lx, sum_l2 = improve(values, weight, code, sum_lx, sum_l2, count, 0, top, False)
    kept = ()
    for index in tl.static_range(count):
        kept = kept + (tl.where(nothing, 0, code[index]),)
    return tl.where(nothing | ~(sum_l2 > 0.0), 0.0, tl.div_rn(sum_lx, sum_l2)), kept


@triton.jit
def _scale_error(values, weight, inverse, count: tl.constexpr, top: tl.constexpr):
    size = tl.div_rn(tl.full(inverse.shape, 1.0, tl.float32), inverse)
    error = tl.zeros_like(inverse)
    for index in tl.static_range(count):
        code = nearest(inverse * values[index])
        code = code & 255 if top == 255 else tl.minimum(code, top)  # the C code keeps the first codes as bytes
        off = values[index] - size * code.to(tl.float32)
        error += weight[index] * off * off
    return error


@triton.jit
def _store_products(target, place, step, code, inside, count: tl.constexpr):
    product = ()
    for index in tl.static_range(count):
        product = product + (step * code[index].to(tl.float32),)
    store_values(target, place, product, inside, count)


@triton.jit
def _store_nibbles(blocks, start, code, offset_code, inside):
    """Q2_K: a byte holds a scale and, above it, a minimum. Gives back what a reader finds."""
    byte = ()
    read = ()
    read_offset = ()
    for index in tl.static_range(16):
        byte = byte + ((code[index] | (offset_code[index] << 4)) & 255,)
        read = read + (byte[index] & 15,)
        read_offset = read_offset + (byte[index] >> 4,)
    store_values(blocks, start, byte, inside, 16)
    return read, read_offset


@triton.jit
def _store_six_bits(blocks, start, code, offset_code, inside, bounded: tl.constexpr):
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes. Gives back what a reader finds."""
    if bounded:
        scale = ()
        minimum = ()
        for index in tl.static_range(8):
            scale = scale + (tl.minimum(code[index], 63),)
            minimum = minimum + (tl.minimum(offset_code[index], 63),)
    else:
        scale = code
        minimum = offset_code
    first = ()
    second = ()
    low = ()
    for index in tl.static_range(4):
        first = first + ((scale[index] | ((scale[index + 4] >> 4) << 6)) & 255,)
        second = second + ((minimum[index] | ((minimum[index + 4] >> 4) << 6)) & 255,)
        low = low + ((scale[index + 4] & 15) | ((minimum[index + 4] & 15) << 4),)
    store_values(blocks, start, first + second + low, inside, 12)
    read = ()
    read_offset = ()
    for index in tl.static_range(4):
        read = read + (first[index] & 63,)
        read_offset = read_offset + (second[index] & 63,)
    for index in tl.static_range(4):
        read = read + ((low[index] & 15) | ((first[index] >> 6) << 4),)
        read_offset = read_offset + ((low[index] >> 4) | ((second[index] >> 6) << 4),)
    return read, read_offset


@triton.jit
def _store_q3_scales(blocks, start, code, inside):
    """Q3_K: 16 scales of 6 bits, from -32 on: low halves in 8 bytes, high pairs in 4."""
    byte = ()
    for index in tl.static_range(8):
        byte = byte + (((code[index] + 32) & 15) | (((code[index + 8] + 32) & 15) << 4),)
    for index in tl.static_range(4):
        pairs = (code[index] + 32) >> 4
        for plane in tl.static_range(1, 4):
            pairs |= ((code[index + 4 * plane] + 32) >> 4) << (2 * plane)
        byte = byte + (pairs,)
    store_values(blocks, start, byte, inside, 12)
