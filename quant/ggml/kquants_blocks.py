"""Whole K-quant blocks, sixteen side by side, compiled by numba: searches, scales of scales, codes, bytes.

Sources: as `kquants`. Tiles: see `kquants_lanes`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.kquants_bytes import (
    pack_half, pack_nibbles, pack_pairs, pack_six_bit_codes, pack_six_bits, pack_top_bit, unpack_six_bits, write_bytes,
)  # fmt: skip
from quantpress.quant.ggml.kquants_lanes import (
    clamped, improve_signed, scales_by_search, search_signed, search_with_minimum,
)  # fmt: skip
from quantpress.quant.lanes import (
    LANES, Mask, Vector, absolute, both, half_bits, join_bits, load, load_transposed, nearest, root, select, set_lanes,
    splat, store, take_bits,
)  # fmt: skip

__all__ = ["encode_signed", "encode_with_minimum"]

Array = NDArray[Any]

_SUPER: Final = 256  # weights of a block
_SIGNED: Final = 16  # weights of a sub-block of Q3_K and Q6_K, and such sub-blocks of a block
_ALL: Final = (1 << LANES) - 1
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_INFINITE: Final = np.float32(np.inf)
_TINY: Final = np.float32(1e-15)  # GROUP_MAX_EPS
# No type reaches this (Q6_K: 65504 * 128 * 32), and the squares of what is below stay far inside float32.
_LARGEST: Final = np.float32(1 << 29)


@compiled()
def _tile(rows: int) -> Array:
    return np.zeros(rows * LANES, np.float32)


@compiled()
def _gather(values: Array, blocks: int, start: int, spare: Array, tile: Array) -> int:
    """Turns sixteen blocks into a tile, zeros after the last; gives the lanes with values that no type holds."""
    starts = np.empty(LANES, np.int64)
    whole = blocks - start >= LANES
    for lane in range(LANES):
        starts[lane] = (start + lane) * _SUPER if whole else lane * _SUPER
    if not whole:
        spare[:] = _ZERO
        left = (blocks - start) * _SUPER
        spare[:left] = values[start * _SUPER : start * _SUPER + left]
    for column in range(0, _SUPER, LANES):
        if whole:
            load_transposed(values, starts, column, tile, column * LANES)
        else:
            load_transposed(spare, starts, column, tile, column * LANES)
    held = splat(_ZERO) == splat(_ZERO)
    for row in range(_SUPER):
        held = both(held, absolute(load(tile, row * LANES)) <= splat(_LARGEST))
    return _ALL ^ set_lanes(held)


@compiled()
def _gather_importance(importance: Array, first: int, tile: Array) -> None:
    """The importance of sixteen blocks, the first of which is number `first` of a row (or of those after it)."""
    starts = np.empty(LANES, np.int64)
    period = importance.size // _SUPER
    for lane in range(LANES):
        starts[lane] = ((first + lane) % period) * _SUPER
    for column in range(0, _SUPER, LANES):
        load_transposed(importance, starts, column, tile, column * LANES)


@compiled()
def _weigh(values: Array, weights: Array, energy: np.float32) -> None:
    """Multiplies importance by the root of a weight's energy and the block's."""
    total = splat(_ZERO)
    for row in range(_SUPER):
        value = load(values, row * LANES)
        total = total + value * value
    level = splat(energy) * total / splat(np.float32(_SUPER))
    for row in range(_SUPER):
        value = load(values, row * LANES)
        store(weights, row * LANES, load(weights, row * LANES) * root(level + value * value))


@compiled()
def _weigh_plainly(values: Array, weights: Array, size: int) -> None:
    """The weights without importance of types with a minimum."""
    for base in range(0, _SUPER, size):
        level = splat(_ZERO)
        if size == 32:
            for row in range(base, base + size):
                value = load(values, row * LANES)
                level = level + value * value
            level = root(level / splat(np.float32(size)))
        for row in range(base, base + size):
            store(weights, row * LANES, level + absolute(load(values, row * LANES)))


@compiled()
def _square(values: Array, weights: Array) -> None:
    for row in range(_SUPER):
        value = load(values, row * LANES)
        store(weights, row * LANES, value * value)


@compiled()
def _sums(weights: Array, size: int, totals: Array) -> int:
    """Sums of sub-blocks; gives the lanes whose sums are finite."""
    finite = splat(_ZERO) == splat(_ZERO)
    for number in range(_SUPER // size):
        total = splat(_ZERO)
        for row in range(number * size, (number + 1) * size):
            total = total + load(weights, row * LANES)
        store(totals, number * LANES, total)
        finite = both(finite, total < splat(_INFINITE))
    return set_lanes(finite)


@compiled()
def _scales_by_greatest(values: Array, count: int, top: np.float32, codes: Array) -> Vector:
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


@compiled()
def _farthest_scale(scales: Array) -> Vector:
    greatest, found = splat(_ZERO), splat(_ZERO)
    for row in range(_SIGNED):
        scale = load(scales, row * LANES)
        farther = absolute(scale) > greatest
        greatest, found = select(farther, absolute(scale), greatest), select(farther, scale, found)
    return found


@compiled()
def _signed_scales_by_farthest(scales: Array, top: np.float32, codes: Array) -> Vector:
    """The step that makes the farthest scale -top, and codes for it from 0 (which is -top)."""
    extreme = _farthest_scale(scales)
    inverse = splat(-top) / extreme
    some = extreme != splat(_ZERO)
    for row in range(_SIGNED):
        code = nearest(inverse * load(scales, row * LANES))
        code = clamped(code, splat(-top), splat(top - _ONE)) + splat(top)
        store(codes, row * LANES, select(some, code, splat(_ZERO)))
    return select(some, splat(_ONE) / inverse, splat(_ZERO))


@compiled()
def _signed_bytes_by_farthest(scales: Array, codes: Array) -> Vector:
    """The step that makes the farthest scale -128, and codes for it, at most 127."""
    inverse = splat(np.float32(-128)) / _farthest_scale(scales)
    for row in range(_SIGNED):
        code = nearest(inverse * load(scales, row * LANES))
        store(codes, row * LANES, select(code > splat(np.float32(127)), splat(np.float32(127)), code))
    return splat(_ONE) / inverse


@compiled()
def _clear(packed: Array, scales: Array) -> None:
    """Zeros for blocks of Q6_K whose scales are all next to 0."""
    nothing = absolute(_farthest_scale(scales)) < splat(_TINY)
    if set_lanes(nothing):
        for row in range(packed.size // LANES):
            store(packed, row * LANES, select(nothing, splat(_ZERO), load(packed, row * LANES)))


@compiled()
def _pack_scale_nibbles(scales: Array, minima: Array, packed: Array) -> None:
    """Scales and minima of Q2_K into the first rows, and what a reader finds there."""
    for row in range(_SIGNED):
        byte = join_bits(load(scales, row * LANES), load(minima, row * LANES), 4)
        store(packed, row * LANES, byte)
        store(scales, row * LANES, take_bits(byte, 0, 15))
        store(minima, row * LANES, take_bits(byte, 4, 15))


@compiled()
def _pack_signed_scales(codes: Array, packed: Array, row: int) -> None:
    """Sixteen scales of six bits into twelve rows: low nibbles of 0 to 7 and 8 to 15, then upper pairs by fours."""
    for number in range(8):
        first, second = load(codes, number * LANES), load(codes, (number + 8) * LANES)
        store(packed, (row + number) * LANES, join_bits(take_bits(first, 0, 15), take_bits(second, 0, 15), 4))
    for number in range(4):
        byte = splat(_ZERO)
        for part in range(4):
            byte = join_bits(byte, take_bits(load(codes, (4 * part + number) * LANES), 4, 3), 2 * part)
        store(packed, (row + 8 + number) * LANES, byte)


@compiled()
def _requantize(values: Array, base: int, size: int, step: Vector, offset: Vector, low: np.float32, high: np.float32,
                codes: Array) -> None:  # fmt: skip
    """Codes from `low` for the step that a reader finds; where it is 0 they stay."""
    least, kept = splat(low), step == splat(_ZERO)
    for row in range(base, base + size):
        code = clamped(nearest((load(values, row * LANES) + offset) / step), least, splat(high)) - least
        store(codes, row * LANES, select(kept, load(codes, row * LANES), code))


@compiled()
def _finite_half(step: Vector) -> Mask:
    return take_bits(half_bits(step), 10, 31) < splat(np.float32(31))


@compiled()
def _ones(lanes: int, blocks: int) -> int:
    found = 0
    for lane in range(blocks):
        found += (lanes >> lane) & 1
    return found


@compiled()
def _cap(codes: Array, count: int, top: np.float32) -> None:
    for row in range(count):
        code = load(codes, row * LANES)
        store(codes, row * LANES, select(code > splat(top), splat(top), code))


@compiled()
def encode_with_minimum(
    values: Array, importance: Array, first: int, out: Array, width: int, size: int, tried: Array, by_size: bool,
    scale_tried: Array, energy: np.float32, capped: bool,
) -> int:  # fmt: skip
    """Writes blocks of Q2_K, Q4_K or Q5_K.

    Args:
        values: flat float32, 256 for each block.
        importance: flat float32 of a row's blocks; empty: without.
        first: number of the first block, from the start of a row.
        out: flat uint8.
        width: bytes of a block.
        size: weights of a sub-block.
        tried: as in `search_with_minimum`.
        by_size: as there.
        scale_tried: as in `scales_by_search`.
        energy: what the mean square of a block counts in the weights with importance.
        capped: whether the codes of scales are bounded.

    Returns:
        Blocks that could not be stored.
    """
    blocks, count, top, scale_top = values.size // _SUPER, _SUPER // size, tried[0], scale_tried[0]
    spare, tile, weights = np.empty(_SUPER * LANES, np.float32), _tile(_SUPER), _tile(_SUPER)
    codes, work, packed = _tile(_SUPER), _tile(size), _tile(-(-width // LANES) * LANES)
    scales, minima, totals, scale_codes, min_codes = (
        _tile(count),
        _tile(count),
        _tile(count),
        _tile(count),
        _tile(count),
    )
    lines = np.empty(packed.size, np.uint8)
    wild = 0
    for start in range(0, blocks, LANES):
        bad = _gather(values, blocks, start, spare, tile)
        if importance.size > 0:
            _gather_importance(importance, first + start, weights)
            _weigh(tile, weights, energy)
            bad |= _ALL ^ _sums(weights, size, totals)
        else:
            _weigh_plainly(tile, weights, size)
        for number in range(count):
            search_with_minimum(
                tile, weights, number * size, size, tried, importance.size > 0, by_size, work, codes, scales, minima,
                number,
            )  # fmt: skip
        if importance.size > 0:
            step = scales_by_search(scales, totals, count, scale_tried, scale_codes)
            offset = scales_by_search(minima, totals, count, scale_tried, min_codes)
        else:
            step = _scales_by_greatest(scales, count, scale_top, scale_codes)
            offset = _scales_by_greatest(minima, count, scale_top, min_codes)
        if capped:
            _cap(scale_codes, count, scale_top)
            _cap(min_codes, count, scale_top)
        bad |= _ALL ^ set_lanes(both(_finite_half(step), _finite_half(offset)))
        head = _SUPER // size + _SUPER // 4 if size == 16 else 0
        step, offset = pack_half(step, packed, head), pack_half(offset, packed, head + 2)
        if size == 16:
            _pack_scale_nibbles(scale_codes, min_codes, packed)
        else:
            pack_six_bits(scale_codes, min_codes, packed, 4)
            unpack_six_bits(packed, 4, scale_codes, min_codes)
        for number in range(count):
            place = number * LANES
            _requantize(tile, number * size, size, step * load(scale_codes, place), offset * load(min_codes, place),
                        _ZERO, top, codes)  # fmt: skip
        if size == 16:
            pack_pairs(codes, packed, count)
        elif top == np.float32(15):
            pack_nibbles(codes, packed, 16)
        else:
            pack_top_bit(codes, np.float32(16), packed, 16)
            pack_nibbles(codes, packed, 48)
        here = min(LANES, blocks - start)
        write_bytes(packed, here, width, lines, out, start)
        wild += _ones(bad, here)
    return wild


@compiled()
def encode_signed(
    values: Array, importance: Array, first: int, out: Array, width: int, tried: Array, scale_tried: Array,
    energy: np.float32,
) -> int:  # fmt: skip
    """Writes blocks of Q3_K or Q6_K; arguments as `encode_with_minimum`.

    `energy` is 0 where the importance is the weight, for Q6_K.
    """
    blocks, top, six = values.size // _SUPER, tried[0], tried[0] == np.float32(32)
    spare, tile, weights = np.empty(_SUPER * LANES, np.float32), _tile(_SUPER), _tile(_SUPER)
    codes, work, packed = _tile(_SUPER), _tile(_SIGNED), _tile(-(-width // LANES) * LANES)
    scales, totals, scale_codes, steps = _tile(_SIGNED), _tile(_SIGNED), _tile(_SIGNED), _tile(1)
    lines = np.empty(packed.size, np.uint8)
    wild = 0
    for start in range(0, blocks, LANES):
        bad = _gather(values, blocks, start, spare, tile)
        if importance.size > 0:
            _gather_importance(importance, first + start, weights)
            if not six:
                _weigh(tile, weights, energy)
            bad |= _ALL ^ _sums(weights, _SIGNED, totals)
        else:
            _square(tile, weights)
        for number in range(_SIGNED):
            if six or importance.size > 0:
                search_signed(tile, weights, number * _SIGNED, _SIGNED, tried, work, codes, scales, number)
            else:
                improve_signed(tile, weights, number * _SIGNED, _SIGNED, top, codes, scales, number)
        if six:
            step = _signed_bytes_by_farthest(scales, scale_codes)
        elif importance.size > 0:
            search_signed(scales, totals, 0, _SIGNED, scale_tried, work, scale_codes, steps, 0)
            step = load(steps, 0)
        else:
            step = _signed_scales_by_farthest(scales, scale_tried[0], scale_codes)
        bad |= _ALL ^ set_lanes(_finite_half(step))
        step = pack_half(step, packed, width - 2)
        for number in range(_SIGNED):
            code = load(scale_codes, number * LANES)
            code = code if six else code - splat(scale_tried[0])
            _requantize(tile, number * _SIGNED, _SIGNED, step * code, splat(_ZERO), -top, top - _ONE, codes)
        if six:
            pack_six_bit_codes(codes, packed, 0)
            for number in range(_SIGNED):
                store(packed, (192 + number) * LANES, take_bits(load(scale_codes, number * LANES), 0, 255))
            _clear(packed, scales)
        else:
            pack_top_bit(codes, np.float32(4), packed, 0)
            pack_pairs(codes, packed, 32)
            _pack_signed_scales(scale_codes, packed, 96)
        here = min(LANES, blocks - start)
        write_bytes(packed, here, width, lines, out, start)
        wild += _ones(bad, here)
    return wild
