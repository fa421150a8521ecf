"""What the searches of scales share: 64 blocks of 32 weights lie side by side, so that the blocks are vector lanes.

libggml adds the terms of a sum from the first weight of a block to the last, each addition rounded, and those additions
wait for each other. Blocks are independent: with a tile of them transposed, each step of 64 such sums is a few vector
operations and the result is the same to the last bit. Nothing here may be reordered or fused, so there is no fastmath.

A division is spelled `np.divide`: that gives infinity or NaN for a divisor of 0 (of lanes whose result is not used)
where `/` would stop the program.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled

__all__ = [
    "COLUMNS",
    "LANES",
    "TINY",
    "farthest",
    "gather",
    "nearest",
    "put_codes",
    "put_halves",
    "put_high_bits",
    "put_nibbles",
    "refuse",
    "rounded",
    "squares",
    "take",
    "weigh",
    "writable",
]

Array = NDArray[Any]

COLUMNS: Final = 32  # weights of a block, or of a sub-block of IQ4_XS
LANES: Final = 64
TINY: Final = np.float32(1e-15)  # GROUP_MAX_EPS: blocks whose values are all nearer to 0 are stored as zeros

_ZERO = np.float32(0)
_ROUNDER = np.float32(1.5 * 2**23)
_ROWS = 8  # whose sums are run side by side
_LOW = np.uint8(15)


def writable(array: Array) -> Array:
    """Gives `array`, or a copy of one that is read-only: numba compiles everything again for those."""
    return array if array.flags.writeable else array.copy()


def put_halves(scales: Array, target: Array) -> NDArray[np.bool_]:
    """Writes `scales` (B,) float32 as float16 to the first two bytes of rows of `target`.

    Returns:
        Which are not finite as float16, (B,).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        half = scales.astype("<f2")
    target[:, :2].view("<f2")[:, 0] = half
    beyond: NDArray[np.bool_] = (half.view("<u2") & np.uint16(0x7C00)) == np.uint16(0x7C00)
    return beyond


@compiled()
def rounded(value: np.float32) -> np.float32:
    """Rounds to the nearest integer, ties to even, for |value| below 2^22; -0 becomes 0."""
    return (value + _ROUNDER) - _ROUNDER


@compiled()
def nearest(value: np.float32, top: np.int32) -> np.float32:
    """Gives nearest_int of ggml-quants.c, cut to [0, top]: ties to even, and of any value what its bits happen to say.

    Beyond 2^22 that is not the nearest integer, and 0 for NaN; searches meet such values where they divide by a range
    that is next to nothing.
    """
    bits = np.int32(np.float32(value + _ROUNDER).view(np.int32) & 0x007FFFFF)
    code = np.int32(bits - 0x00400000)
    code = np.int32(0) if code < 0 else code
    return np.float32(top if code > top else code)


@compiled()
def gather(blocks: Array, first: int, tile: Array) -> None:
    """Fills `tile` (32, 64) with blocks `first` and following of `blocks` (B, 32); lanes past the end with zeros."""
    count = min(blocks.shape[0] - first, tile.shape[1])
    for lane in range(count):
        block = blocks[first + lane]
        for column in range(tile.shape[0]):
            tile[column, lane] = block[column]
    for column in range(tile.shape[0]):
        for lane in range(count, tile.shape[1]):
            tile[column, lane] = _ZERO


@compiled()
def take(numbers: Array, first: int, lanes: Array) -> None:
    """Fills `lanes` (64,) with `numbers` from `first` on; lanes past the end keep what they hold.

    A slice that is assigned does the same and takes numba five seconds to compile, for its error message.
    """
    for lane in range(min(numbers.size - first, lanes.size)):
        lanes[lane] = numbers[first + lane]


@compiled()
def squares(rows: Array, sums: Array) -> None:
    """Sums the squares of each row of `rows` (R, n) from its first to its last into `sums` (R,), all float32."""
    for start in range(0, rows.shape[0], _ROWS):
        stop = min(start + _ROWS, rows.shape[0])
        for row in range(start, stop):
            sums[row] = _ZERO
        for column in range(rows.shape[1]):
            for row in range(start, stop):
                sums[row] += rows[row, column] * rows[row, column]


@compiled()
def weigh(tile: Array, importance: Array, first: int, energy: Array, weights: Array) -> None:
    """Fills `weights` (32, 64) with what an error of each weight costs: importance * sqrt(energy + weight^2).

    Args:
        tile: (32, 64) float32 weights.
        importance: (P, 32) float32; lane b has row (first + b) % P. Without rows the cost is weight^2.
        first: number of the first lane's block in its row.
        energy: (64,) float32.
        weights: (32, 64) float32, filled.
    """
    period = importance.shape[0]
    if period == 0:
        for column in range(tile.shape[0]):
            for lane in range(tile.shape[1]):
                weights[column, lane] = tile[column, lane] * tile[column, lane]
        return
    for lane in range(tile.shape[1]):
        costs = importance[(first + lane) % period]
        for column in range(tile.shape[0]):
            weights[column, lane] = costs[column]
    for column in range(tile.shape[0]):
        for lane in range(tile.shape[1]):
            value = tile[column, lane]
            weights[column, lane] *= np.sqrt(energy[lane] + value * value)


@compiled()
def farthest(tile: Array, extreme: Array) -> None:
    """Fills `extreme` (64,) with each lane's value that is farthest from 0, the first of several."""
    for lane in range(tile.shape[1]):
        extreme[lane] = _ZERO
    for column in range(tile.shape[0]):
        for lane in range(tile.shape[1]):
            value = tile[column, lane]
            if abs(value) > abs(extreme[lane]):
                extreme[lane] = value


@compiled()
def refuse(tile: Array, check: Array, scales: Array) -> None:
    """Makes NaN of the scale in `scales` (64,) of each lane that has NaN or infinity; `check` (64,) is scratch."""
    for lane in range(tile.shape[1]):
        check[lane] = _ZERO
    for column in range(tile.shape[0]):
        for lane in range(tile.shape[1]):
            check[lane] += tile[column, lane] * _ZERO
    for lane in range(tile.shape[1]):
        scales[lane] = scales[lane] if check[lane] == _ZERO else np.float32(np.nan)


@compiled()
def put_nibbles(codes: Array, lane: int, target: Array) -> None:
    """Packs the low halves of column `lane` of `codes` (32, 64) into `target` (16,): j with j + 16, as Q4_0 does."""
    for byte in range(16):
        target[byte] = (codes[byte, lane] & _LOW) | (codes[byte + 16, lane] & _LOW) << 4


@compiled()
def put_high_bits(codes: Array, lane: int, target: Array) -> None:
    """Packs the fifth bits of column `lane` of `codes` (32, 64) into `target` (4,), the first weight's lowest."""
    for byte in range(4):
        bits = 0
        for bit in range(8):
            bits |= int(codes[8 * byte + bit, lane] >> 4 & 1) << bit
        target[byte] = np.uint8(bits)


@compiled()
def put_codes(codes: Array, lane: int, target: Array) -> None:
    """Packs one block's codes: their low halves, after their fifth bits where `target` has room for those."""
    head = target.size - COLUMNS // 2
    if head:
        put_high_bits(codes, lane, target[:head])
    put_nibbles(codes, lane, target[head:])
