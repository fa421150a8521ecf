"""Sixteen blocks turned into tiles, and what their errors cost; compiled by numba. Sources: as `kquants`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.lane_bits import load_transposed
from quantpress.quant.lanes import LANES, absolute, both, load, part, root, set_lanes, splat, store

__all__ = [
    "ALL_LANES",
    "SUPER",
    "Tiles",
    "gather",
    "gather_importance",
    "make_tiles",
    "square",
    "sums",
    "weigh",
    "weigh_plainly",
]

Array = NDArray[Any]

SUPER: Final = 256
"""Weights of a block."""

ALL_LANES: Final = (1 << LANES) - 1
"""Lanes as bits of a number, all set."""

_LINE: Final = 64  # bytes of a cache line, and of a row
_ZERO: Final = np.float32(0)
_INFINITE: Final = np.float32(np.inf)
# No type reaches this (Q6_K: 65504 * 128 * 32), and the squares of what is below stay far inside float32.
_LARGEST: Final = np.float32(1 << 29)


class Tiles(NamedTuple):
    """What the encoders work in. A tile is flat float32, rows of sixteen lanes.

    Attributes:
        values: tile of 256 rows, the weights.
        weights: what their errors cost.
        codes: whole numbers, in the order of the weights.
        packed: bytes of the blocks as whole numbers, a row for each.
        scales: 16 rows, for sub-blocks.
        minima: as `scales`.
        totals: as `scales`; sums of `weights`.
        scale_codes: as `scales`.
        min_codes: as `scales`.
        work: 32 rows.
        spare: 16 blocks one after the other, as they come.
        lines: (16 * bytes of a block,) uint8, the blocks' bytes one after the other.
        starts: (16,) int64, where the blocks start.
    """

    values: Array
    weights: Array
    codes: Array
    packed: Array
    scales: Array
    minima: Array
    totals: Array
    scale_codes: Array
    min_codes: Array
    work: Array
    spare: Array
    lines: Array
    starts: Array


def make_tiles(block_bytes: int) -> Tiles:
    """Room for sixteen blocks of so many bytes."""
    rows = (SUPER, SUPER, SUPER, block_bytes, 16, 16, 16, 16, 16, 32, SUPER)
    room = np.zeros((sum(rows) + 1) * LANES, np.float32)
    row = room[
        -room.ctypes.data % _LINE // room.itemsize :
    ]  # rows that straddle two cache lines are read at half speed
    starts = np.cumsum((0, *rows)) * LANES
    parts = [row[start:end] for start, end in pairwise(starts)]
    lines, places = np.empty(block_bytes * LANES, np.uint8), np.empty(LANES, np.int64)
    return Tiles._make((*parts, lines, places))


@part
def gather(values: Array, start: int, tiles: Tiles) -> int:
    """Turns sixteen blocks into a tile, zeros after the last; gives the lanes with values that no type holds."""
    whole = (start + LANES) * SUPER <= values.size
    for lane in range(LANES):
        tiles.starts[lane] = (start + lane if whole else lane) * SUPER
    if not whole:
        for place in range(SUPER * LANES):
            here = start * SUPER + place
            tiles.spare[place] = values[here] if here < values.size else _ZERO
    for column in range(0, SUPER, LANES):
        if whole:
            load_transposed(values, tiles.starts, column, tiles.values, column * LANES)
        else:
            load_transposed(tiles.spare, tiles.starts, column, tiles.values, column * LANES)
    held = splat(_ZERO) == splat(_ZERO)
    for row in range(SUPER):
        held = both(held, absolute(load(tiles.values, row * LANES)) <= splat(_LARGEST))
    lanes: int = ALL_LANES ^ set_lanes(held)
    return lanes


@part
def gather_importance(importance: Array, first: int, tiles: Tiles) -> None:
    """The importance of sixteen blocks, the first of which is number `first` of a row (or of those after it)."""
    period = importance.size // SUPER
    for lane in range(LANES):
        tiles.starts[lane] = ((first + lane) % period) * SUPER
    for column in range(0, SUPER, LANES):
        load_transposed(importance, tiles.starts, column, tiles.weights, column * LANES)


@part
def weigh(values: Array, weights: Array, energy: np.float32) -> None:
    """Multiplies importance by the root of a weight's energy and the block's."""
    total = splat(_ZERO)
    for row in range(SUPER):
        value = load(values, row * LANES)
        total = total + value * value
    level = splat(energy) * total / splat(np.float32(SUPER))
    for row in range(SUPER):
        value = load(values, row * LANES)
        store(weights, row * LANES, load(weights, row * LANES) * root(level + value * value))


@part
def weigh_plainly(values: Array, weights: Array, size: int) -> None:
    """The weights without importance of types with a minimum."""
    for base in range(0, SUPER, size):
        level = splat(_ZERO)
        if size == 32:
            for row in range(base, base + size):
                value = load(values, row * LANES)
                level = level + value * value
            level = root(level / splat(np.float32(size)))
        for row in range(base, base + size):
            store(weights, row * LANES, level + absolute(load(values, row * LANES)))


@part
def square(values: Array, weights: Array) -> None:
    """The weights without importance of types without a minimum."""
    for row in range(SUPER):
        value = load(values, row * LANES)
        store(weights, row * LANES, value * value)


@part
def sums(weights: Array, size: int, totals: Array) -> int:
    """Sums of sub-blocks; gives the lanes whose sums are finite."""
    finite = splat(_ZERO) == splat(_ZERO)
    for number in range(SUPER // size):
        total = splat(_ZERO)
        for row in range(number * size, (number + 1) * size):
            total = total + load(weights, row * LANES)
        store(totals, number * LANES, total)
        finite = both(finite, total < splat(_INFINITE))
    lanes: int = set_lanes(finite)
    return lanes
