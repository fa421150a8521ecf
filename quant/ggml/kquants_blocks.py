"""Whole K-quant blocks, sixteen side by side, compiled by numba: searches, scales of scales, codes, bytes.

Sources: as `kquants`. Tiles: see `kquants_tiles`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.kquants_bytes import (
    pack_half,
    pack_nibbles,
    pack_pairs,
    pack_scale_nibbles,
    pack_signed_scales,
    pack_six_bit_codes,
    pack_six_bits,
    pack_top_bit,
    unpack_six_bits,
    write_bytes,
)
from quantpress.quant.ggml.kquants_lanes import clamped, improve_signed, search_signed, search_with_minimum
from quantpress.quant.ggml.kquants_scales import (
    cap,
    clear_small,
    scales_by_greatest,
    scales_by_search,
    signed_bytes_by_farthest,
    signed_scales_by_farthest,
)
from quantpress.quant.ggml.kquants_tiles import (
    ALL_LANES,
    SUPER,
    Tiles,
    gather,
    gather_importance,
    square,
    sums,
    weigh,
    weigh_plainly,
)
from quantpress.quant.lane_bits import half_bits, nearest, take_bits
from quantpress.quant.lanes import LANES, Vector, load, part, select, set_lanes, splat, store

__all__ = ["Recipe", "encode_signed", "encode_with_minimum"]

Array = NDArray[Any]

_SIGNED: Final = 16  # weights of a sub-block of Q3_K and Q6_K, and such sub-blocks of a block
_ZERO: Final = np.float32(0)


class Recipe(NamedTuple):
    """How a type is searched.

    Attributes:
        block_bytes: bytes of a block.
        size: weights of a sub-block.
        tried: (T,) float32, what is tried for a sub-block, divided by its range; the first is the greatest code, or for
            types without a minimum the middle one.
        scale_tried: as `tried`, for the scales of a block.
        by_size: errors count by their size, not their square.
        capped: the codes of scales are bounded.
        energy: what the mean square of a block counts in the weights with importance.
    """

    block_bytes: int
    size: int
    tried: Array
    scale_tried: Array
    by_size: bool
    capped: bool
    energy: np.float32


@part
def _unstorable(step: Vector) -> int:
    """The lanes whose step is beyond float16."""
    lanes: int = ALL_LANES ^ set_lanes(take_bits(half_bits(step), 10, 31) < splat(np.float32(31)))
    return lanes


@part
def _ones(lanes: int, blocks: int) -> int:
    found = 0
    for lane in range(blocks):
        found += (lanes >> lane) & 1
    return found


@part
def _requantize(tiles: Tiles, base: int, size: int, step: Vector, offset: Vector, low: np.float32,
                high: np.float32) -> None:  # fmt: skip
    """Codes from `low` for the step that a reader finds; where it is 0 they stay."""
    least, kept = splat(low), step == splat(_ZERO)
    for row in range(base, base + size):
        code = clamped(nearest((load(tiles.values, row * LANES) + offset) / step), least, splat(high)) - least
        store(tiles.codes, row * LANES, select(kept, load(tiles.codes, row * LANES), code))


@part
def _pack_with_minimum(tiles: Tiles, step: Vector, offset: Vector, recipe: Recipe) -> None:
    """Scales, codes for what a reader finds of them, and all bytes of the blocks."""
    size, count, packed = recipe.size, SUPER // recipe.size, tiles.packed
    head = recipe.block_bytes - 4 if size == 16 else 0
    step, offset = pack_half(step, packed, head), pack_half(offset, packed, head + 2)
    if size == 16:
        pack_scale_nibbles(tiles.scale_codes, tiles.min_codes, packed)
    else:
        pack_six_bits(tiles.scale_codes, tiles.min_codes, packed, 4)
        unpack_six_bits(packed, 4, tiles.scale_codes, tiles.min_codes)
    for number in range(count):
        scale = step * load(tiles.scale_codes, number * LANES)
        minimum = offset * load(tiles.min_codes, number * LANES)
        _requantize(tiles, number * size, size, scale, minimum, _ZERO, recipe.tried[0])
    if size == 16:
        pack_pairs(tiles.codes, packed, count)
    elif recipe.tried[0] == np.float32(15):
        pack_nibbles(tiles.codes, packed, 16)
    else:
        pack_top_bit(tiles.codes, np.float32(16), packed, 16)
        pack_nibbles(tiles.codes, packed, 48)


@compiled()
def encode_with_minimum(values: Array, importance: Array, first: int, out: Array, recipe: Recipe, tiles: Tiles) -> int:
    """Writes blocks of Q2_K, Q4_K or Q5_K.

    Args:
        values: flat float32, 256 for each block.
        importance: flat float32 of a row's blocks; empty: without.
        first: number of the first block, from the start of a row.
        out: flat uint8.
        recipe: of the type.
        tiles: to work in.

    Returns:
        Blocks that could not be stored.
    """
    blocks, size, count, wild = values.size // SUPER, recipe.size, SUPER // recipe.size, 0
    weighted = importance.size > 0
    for start in range(0, blocks, LANES):
        bad = gather(values, start, tiles)
        if weighted:
            gather_importance(importance, first + start, tiles)
            weigh(tiles.values, tiles.weights, recipe.energy)
            bad |= ALL_LANES ^ sums(tiles.weights, size, tiles.totals)
        else:
            weigh_plainly(tiles.values, tiles.weights, size)
        for number in range(count):
            search_with_minimum(tiles, number, size, recipe.tried, recipe.by_size)
        if weighted:
            step = scales_by_search(tiles.scales, tiles.totals, count, recipe.scale_tried, tiles.scale_codes)
            offset = scales_by_search(tiles.minima, tiles.totals, count, recipe.scale_tried, tiles.min_codes)
        else:
            step = scales_by_greatest(tiles.scales, count, recipe.scale_tried[0], tiles.scale_codes)
            offset = scales_by_greatest(tiles.minima, count, recipe.scale_tried[0], tiles.min_codes)
        if recipe.capped:
            cap(tiles.scale_codes, count, recipe.scale_tried[0])
            cap(tiles.min_codes, count, recipe.scale_tried[0])
        _pack_with_minimum(tiles, step, offset, recipe)
        here = min(LANES, blocks - start)
        write_bytes(tiles, here, recipe.block_bytes, out, start)
        wild += _ones(bad | _unstorable(step) | _unstorable(offset), here)
    return wild


@part
def _pack_signed(tiles: Tiles, step: Vector, recipe: Recipe) -> None:
    """Codes for the scales that a reader finds, and all bytes of the blocks."""
    packed, top, six = tiles.packed, recipe.tried[0], recipe.tried[0] == np.float32(32)
    step = pack_half(step, packed, recipe.block_bytes - 2)
    for number in range(_SIGNED):
        code = load(tiles.scale_codes, number * LANES)
        code = code if six else code - splat(recipe.scale_tried[0])
        _requantize(tiles, number * _SIGNED, _SIGNED, step * code, splat(_ZERO), -top, top - np.float32(1))
    if six:
        pack_six_bit_codes(tiles.codes, packed, 0)
        for number in range(_SIGNED):
            store(packed, (192 + number) * LANES, take_bits(load(tiles.scale_codes, number * LANES), 0, 255))
        clear_small(packed, tiles.scales)
    else:
        pack_top_bit(tiles.codes, np.float32(4), packed, 0)
        pack_pairs(tiles.codes, packed, 32)
        pack_signed_scales(tiles.scale_codes, packed, 96)


@compiled()
def encode_signed(values: Array, importance: Array, first: int, out: Array, recipe: Recipe, tiles: Tiles) -> int:
    """Writes blocks of Q3_K or Q6_K; as `encode_with_minimum`."""
    blocks, six, wild = values.size // SUPER, recipe.tried[0] == np.float32(32), 0
    weighted = importance.size > 0
    for start in range(0, blocks, LANES):
        bad = gather(values, start, tiles)
        if weighted:
            gather_importance(importance, first + start, tiles)
            if not six:  # for Q6_K the importance is the weight
                weigh(tiles.values, tiles.weights, recipe.energy)
            bad |= ALL_LANES ^ sums(tiles.weights, _SIGNED, tiles.totals)
        else:
            square(tiles.values, tiles.weights)
        for number in range(_SIGNED):
            if six or weighted:
                search_signed(tiles.values, tiles.weights, number, recipe.tried, tiles.work, tiles.codes, tiles.scales)
            else:
                improve_signed(tiles, number, recipe.tried[0])
        if six:
            step = signed_bytes_by_farthest(tiles.scales, tiles.scale_codes)
        elif weighted:
            search_signed(
                tiles.scales, tiles.totals, 0, recipe.scale_tried, tiles.work, tiles.scale_codes, tiles.minima
            )
            step = load(tiles.minima, 0)
        else:
            step = signed_scales_by_farthest(tiles.scales, recipe.scale_tried[0], tiles.scale_codes)
        _pack_signed(tiles, step, recipe)
        here = min(LANES, blocks - start)
        write_bytes(tiles, here, recipe.block_bytes, out, start)
        wild += _ones(bad | _unstorable(step), here)
    return wild
