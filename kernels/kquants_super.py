"""Scales of super-blocks: the scales (and minima) of their sub-blocks, rounded to a grid of their own and stored.

One lane for each super-block of `count` sub-blocks. `work` is that of kquants_blocks; scale and minimum of a sub-block
are replaced by what a reader will multiply and subtract. Scale bytes and float16 steps go into the blocks, (blocks,
bytes of a block) uint8; layouts: block_q*_K in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantpress.kernels.kquants_search import farthest, improve, nearest, search_signed

__all__ = ["scales_with_minimum", "signed_scales"]

_TINY = tl.constexpr(1e-15)


@triton.jit  # type: ignore[untyped-decorator]
def scales_with_minimum(  # type: ignore[no-untyped-def]
    work, blocks, total, supers, count: tl.constexpr, top: tl.constexpr, bounded: tl.constexpr,
    weighted: tl.constexpr, block_bytes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Q2_K (16 sub-blocks), Q4_K and Q5_K (8); `bounded`: codes stay below top, whatever the scales are."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = lane < supers
    place = tl.minimum(lane, supers - 1)
    scale = _load_all(work, place, count)
    minimum = _load_all(work + total, place, count)
    if weighted:
        weight = _load_all(work + 2 * total, place, count)
        step, code = _fit_scales(scale, weight, count, top)
        offset_step, offset_code = _fit_scales(minimum, weight, count, top)
    else:
        step, code = _largest_to_top(scale, count, top)
        offset_step, offset_code = _largest_to_top(minimum, count, top)
    target = blocks + place * block_bytes
    if count == 16:
        code, offset_code = _store_nibbles(target, code, offset_code, inside)
        step = _store_half(target + 80, step, inside)
        offset_step = _store_half(target + 82, offset_step, inside)
    else:
        code, offset_code = _store_six_bits(target + 4, code, offset_code, inside, bounded)
        step = _store_half(target, step, inside)
        offset_step = _store_half(target + 2, offset_step, inside)
    for index in tl.static_range(count):
        sub = place * count + index
        tl.store(work + sub, step * code[index].to(tl.float32), mask=inside)
        tl.store(work + total + sub, offset_step * offset_code[index].to(tl.float32), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def signed_scales(  # type: ignore[no-untyped-def]
    work, blocks, total, supers, six: tl.constexpr, weighted: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Q6_K (`six`) and Q3_K: 16 sub-blocks without minima."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = lane < supers
    place = tl.minimum(lane, supers - 1)
    scale = _load_all(work, place, 16)
    if six:
        step, code = _farthest_to_end(scale, -128, 127, _TINY)
        # a block of zeros has no codes of a search either
        empty = inside & ~(tl.abs(farthest(scale, 16)) >= _TINY)
        for index in tl.static_range(16):
            tl.store(work + 3 * total + place * 16 + index, float("inf"), mask=empty)
        target = blocks + place * 210 + 192
        for index in tl.static_range(16):
            tl.store(target + index, (code[index] & 255).to(tl.uint8), mask=inside)
        step = _store_half(target + 16, step, inside)
    else:
        if weighted:
            weight = _load_all(work + 2 * total, place, 16)
            step, factor = search_signed(scale, weight, 16, 32)
            code = ()
            for index in tl.static_range(16):
                number = tl.minimum(tl.maximum(nearest(factor * scale[index]), -32), 31)
                code = code + (tl.where(factor == float("inf"), -32, number),)
        else:
            step, code = _farthest_to_end(scale, -32, 31, 0.0)
        target = blocks + place * 110 + 96
        _store_q3_scales(target, code, inside)
        step = _store_half(target + 12, step, inside)
    for index in tl.static_range(16):
        tl.store(work + place * 16 + index, step * code[index].to(tl.float32), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _load_all(source, place, count: tl.constexpr):  # type: ignore[no-untyped-def]
    found = ()
    for index in tl.static_range(count):
        found = found + (tl.load(source + place * count + index),)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _largest_to_top(values, count: tl.constexpr, top: tl.constexpr):  # type: ignore[no-untyped-def]
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


@triton.jit  # type: ignore[untyped-decorator]
def _farthest_to_end(values, end: tl.constexpr, high: tl.constexpr, least: tl.constexpr):  # type: ignore[no-untyped-def]
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


@triton.jit  # type: ignore[untyped-decorator]
def _fit_scales(values, weight, count: tl.constexpr, top: tl.constexpr):  # type: ignore[no-untyped-def]
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
    for _ in tl.static_range(5):
        code, sum_lx, sum_l2 = improve(values, weight, code, sum_lx, sum_l2, count, 0, top, False)
    kept = ()
    for index in tl.static_range(count):
        kept = kept + (tl.where(nothing, 0, code[index]),)
    return tl.where(nothing | ~(sum_l2 > 0.0), 0.0, tl.div_rn(sum_lx, sum_l2)), kept


@triton.jit  # type: ignore[untyped-decorator]
def _scale_error(values, weight, inverse, count: tl.constexpr, top: tl.constexpr):  # type: ignore[no-untyped-def]
    size = tl.div_rn(tl.full(inverse.shape, 1.0, tl.float32), inverse)
    error = tl.zeros_like(inverse)
    for index in tl.static_range(count):
        code = nearest(inverse * values[index])
        if top == 255:
            code = code & 255  # the C code keeps the first codes as bytes
        else:
            code = tl.minimum(code, top)
        off = values[index] - size * code.to(tl.float32)
        error += weight[index] * off * off
    return error


@triton.jit  # type: ignore[untyped-decorator]
def _store_half(target, step, inside):  # type: ignore[no-untyped-def]
    """Stores a float16 as two bytes and gives it back as float32."""
    half = step.to(tl.float16)
    bits = half.to(tl.uint16, bitcast=True).to(tl.int32)
    tl.store(target, (bits & 255).to(tl.uint8), mask=inside)
    tl.store(target + 1, (bits >> 8).to(tl.uint8), mask=inside)
    return half.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _store_nibbles(target, code, offset_code, inside):  # type: ignore[no-untyped-def]
    """Q2_K: a byte holds a scale and, above it, a minimum. Gives back what a reader finds."""
    read = ()
    read_offset = ()
    for index in tl.static_range(16):
        byte = (code[index] | (offset_code[index] << 4)) & 255
        tl.store(target + index, byte.to(tl.uint8), mask=inside)
        read = read + (byte & 15,)
        read_offset = read_offset + (byte >> 4,)
    return read, read_offset


@triton.jit  # type: ignore[untyped-decorator]
def _store_six_bits(target, code, offset_code, inside, bounded: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes. Gives back what a reader finds."""
    scale = ()
    minimum = ()
    for index in tl.static_range(8):
        if bounded:
            scale = scale + (tl.minimum(code[index], 63),)
            minimum = minimum + (tl.minimum(offset_code[index], 63),)
        else:
            scale = scale + (code[index],)
            minimum = minimum + (offset_code[index],)
    head = ()
    head_min = ()
    tail = ()
    tail_min = ()
    for index in tl.static_range(4):
        first = (scale[index] | ((scale[index + 4] >> 4) << 6)) & 255
        second = (minimum[index] | ((minimum[index + 4] >> 4) << 6)) & 255
        low = (scale[index + 4] & 15) | ((minimum[index + 4] & 15) << 4)
        tl.store(target + index, first.to(tl.uint8), mask=inside)
        tl.store(target + 4 + index, second.to(tl.uint8), mask=inside)
        tl.store(target + 8 + index, low.to(tl.uint8), mask=inside)
        head = head + (first & 63,)
        head_min = head_min + (second & 63,)
        tail = tail + ((low & 15) | ((first >> 6) << 4),)
        tail_min = tail_min + ((low >> 4) | ((second >> 6) << 4),)
    return head + tail, head_min + tail_min


@triton.jit  # type: ignore[untyped-decorator]
def _store_q3_scales(target, code, inside):  # type: ignore[no-untyped-def]
    """Q3_K: 16 scales of 6 bits, from -32 on: low halves in 8 bytes, high pairs in 4."""
    for index in tl.static_range(8):
        byte = ((code[index] + 32) & 15) | (((code[index + 8] + 32) & 15) << 4)
        tl.store(target + index, byte.to(tl.uint8), mask=inside)
    for index in tl.static_range(4):
        byte = (code[index] + 32) >> 4
        for plane in tl.static_range(1, 4):
            byte |= ((code[index + 4 * plane] + 32) >> 4) << (2 * plane)
        tl.store(target + 8 + index, byte.to(tl.uint8), mask=inside)
