"""Bytes of K-quant blocks from codes, for sixteen blocks side by side, compiled by numba.

Layouts: block_q2_K to block_q6_K in llama.cpp's ggml-common.h. Tiles as in `kquants_lanes`; those of bytes hold whole
numbers in [0, 256), row r being byte r of the blocks. Codes are in the order of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.kquants_tiles import Tiles
from quantpress.quant.lane_bits import half_bits, half_value, join_bits, store_bytes_transposed, take_bits
from quantpress.quant.lanes import LANES, Vector, load, part, select, splat, store

__all__ = [
    "pack_half",
    "pack_nibbles",
    "pack_pairs",
    "pack_scale_nibbles",
    "pack_signed_scales",
    "pack_six_bit_codes",
    "pack_six_bits",
    "pack_top_bit",
    "unpack_six_bits",
    "write_bytes",
]

Array = NDArray[Any]

_PLANE = 32  # codes that are stored in one bit position of 32 bytes


@part
def pack_half(step: Vector, packed: Array, row: int) -> Vector:
    """Writes a float16 into two rows; gives what a reader finds in them."""
    bits = half_bits(step)
    store(packed, row * LANES, take_bits(bits, 0, 255))
    store(packed, (row + 1) * LANES, take_bits(bits, 8, 255))
    return half_value(bits)


@part
def pack_six_bits(scales: Array, minima: Array, packed: Array, row: int) -> None:
    """Eight scales and minima of Q4_K and Q5_K into twelve rows; those above 63 run into their neighbours."""
    for number in range(4):
        scale, minimum = load(scales, number * LANES), load(minima, number * LANES)
        late, late_minimum = load(scales, (number + 4) * LANES), load(minima, (number + 4) * LANES)
        store(packed, (row + number) * LANES, join_bits(scale, take_bits(late, 4, 15), 6))
        store(packed, (row + 4 + number) * LANES, join_bits(minimum, take_bits(late_minimum, 4, 15), 6))
        store(packed, (row + 8 + number) * LANES, join_bits(take_bits(late, 0, 15), take_bits(late_minimum, 0, 15), 4))


@part
def unpack_six_bits(packed: Array, row: int, scales: Array, minima: Array) -> None:
    """What a reader finds in the rows that `pack_six_bits` wrote."""
    for number in range(4):
        first, second = load(packed, (row + number) * LANES), load(packed, (row + 4 + number) * LANES)
        last = load(packed, (row + 8 + number) * LANES)
        store(scales, number * LANES, take_bits(first, 0, 63))
        store(minima, number * LANES, take_bits(second, 0, 63))
        store(scales, (number + 4) * LANES, join_bits(take_bits(last, 0, 15), take_bits(first, 6, 3), 4))
        store(minima, (number + 4) * LANES, join_bits(take_bits(last, 4, 15), take_bits(second, 6, 3), 4))


@part
def pack_top_bit(codes: Array, value: np.float32, packed: Array, row: int) -> None:
    """Takes the bit worth `value`, the highest, out of 256 codes; bit p of row i is that of place i of plane p."""
    least = splat(value)
    for place in range(_PLANE):
        byte, worth = splat(np.float32(0)), np.float32(1)
        for plane in range(8):
            where = (_PLANE * plane + place) * LANES
            code = load(codes, where)
            high = code >= least
            byte = byte + select(high, splat(worth), splat(np.float32(0)))
            store(codes, where, select(high, code - least, code))
            worth = worth * np.float32(2)
        store(packed, (row + place) * LANES, byte)


@part
def pack_nibbles(codes: Array, packed: Array, row: int) -> None:
    """256 codes of four bits into 128 rows: planes 2 p and 2 p + 1 fill rows 32 p to 32 p + 31."""
    for pair in range(4):
        for place in range(_PLANE):
            where = (2 * _PLANE * pair + place) * LANES
            byte = load(codes, where) + load(codes, where + _PLANE * LANES) * splat(np.float32(16))
            store(packed, (row + _PLANE * pair + place) * LANES, byte)


@part
def pack_pairs(codes: Array, packed: Array, row: int) -> None:
    """256 codes of two bits into 64 rows: planes 4 h to 4 h + 3 fill rows 32 h to 32 h + 31."""
    for half in range(2):
        for place in range(_PLANE):
            where = (4 * _PLANE * half + place) * LANES
            byte = load(codes, where) + load(codes, where + _PLANE * LANES) * splat(np.float32(4))
            byte = byte + load(codes, where + 2 * _PLANE * LANES) * splat(np.float32(16))
            byte = byte + load(codes, where + 3 * _PLANE * LANES) * splat(np.float32(64))
            store(packed, (row + _PLANE * half + place) * LANES, byte)


@part
def pack_six_bit_codes(codes: Array, packed: Array, row: int) -> None:
    """256 codes of Q6_K into 192 rows: low nibbles of planes two apart share 64 + 64 rows, upper pairs follow."""
    for half in range(2):
        for place in range(_PLANE):
            where = (4 * _PLANE * half + place) * LANES
            first, second = load(codes, where), load(codes, where + _PLANE * LANES)
            third, fourth = load(codes, where + 2 * _PLANE * LANES), load(codes, where + 3 * _PLANE * LANES)
            low = (row + 2 * _PLANE * half + place) * LANES
            store(packed, low, join_bits(take_bits(first, 0, 15), take_bits(third, 0, 15), 4))
            store(packed, low + _PLANE * LANES, join_bits(take_bits(second, 0, 15), take_bits(fourth, 0, 15), 4))
            byte = join_bits(take_bits(first, 4, 3), take_bits(second, 4, 3), 2)
            byte = join_bits(join_bits(byte, take_bits(third, 4, 3), 4), take_bits(fourth, 4, 3), 6)
            store(packed, (row + 4 * _PLANE + _PLANE * half + place) * LANES, byte)


@part
def write_bytes(tiles: Tiles, blocks: int, width: int, out: Array, first: int) -> None:
    """Writes the first `blocks` lanes as blocks of `width` bytes, the first being number `first` of `out`."""
    row = 0
    while row < width:
        row = min(row, width - LANES)  # the last sixteen overlap those before
        if blocks == LANES:
            store_bytes_transposed(tiles.packed, row * LANES, out, first * width + row, width)
        else:
            store_bytes_transposed(tiles.packed, row * LANES, tiles.lines, row, width)
        row += LANES
    if blocks < LANES:
        for byte in range(blocks * width):
            out[first * width + byte] = tiles.lines[byte]


@part
def pack_scale_nibbles(scales: Array, minima: Array, packed: Array) -> None:
    """Scales and minima of Q2_K into the first rows, and what a reader finds there."""
    for row in range(16):
        byte = join_bits(load(scales, row * LANES), load(minima, row * LANES), 4)
        store(packed, row * LANES, byte)
        store(scales, row * LANES, take_bits(byte, 0, 15))
        store(minima, row * LANES, take_bits(byte, 4, 15))


@part
def pack_signed_scales(codes: Array, packed: Array, row: int) -> None:
    """Sixteen scales of six bits into twelve rows: low nibbles of 0 to 7 and 8 to 15, then upper pairs by fours."""
    for number in range(8):
        first, second = load(codes, number * LANES), load(codes, (number + 8) * LANES)
        store(packed, (row + number) * LANES, join_bits(take_bits(first, 0, 15), take_bits(second, 0, 15), 4))
    for number in range(4):
        byte = splat(np.float32(0))
        for four in range(4):
            byte = join_bits(byte, take_bits(load(codes, (4 * four + number) * LANES), 4, 3), 2 * four)
        store(packed, (row + 8 + number) * LANES, byte)
