"""GPTQ's inner loop, compiled by numba, for a chunk of rows that lies transposed: the rows are the vector lanes.

Every column needs the errors of the column before, so a row alone is one long chain of dependent operations. Rows are
independent: with a chunk of them side by side each step of the chain is one vector operation over the chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled

__all__ = ["error_and_power", "gather", "quantize_columns", "scatter"]

Array = NDArray[Any]

_ZERO = np.float32(0)
_ONE = np.float32(1)


@compiled()
def gather(weight: Array, order: Array, work: Array) -> None:
    """Fills `work` (K, R) with the columns `order` of `weight` (n, K), n <= R; other lanes keep what they hold."""
    for place in range(order.size):
        column = order[place]
        for row in range(weight.shape[0]):
            work[place, row] = weight[row, column]


@compiled()
def scatter(found: Array, order: Array, codes: Array) -> None:
    """Fills columns `order` of `codes` (n, K) from `found` (K, R)."""
    for place in range(order.size):
        column = order[place]
        for row in range(codes.shape[0]):
            codes[row, column] = found[place, row]


@compiled("contract")
def quantize_columns(
    work: Array, upper: Array, scale: Array, zero: Array, groups: Array, codes: Array, errors: Array, losses: Array,
    top: np.float32,
) -> None:  # fmt: skip
    """Quantizes a block of columns and passes each error on to the columns of the block that follow.

    Args:
        work: (B, R) float32, the columns in visiting order; changed.
        upper: (B, B) float32 diagonal block of U.
        scale: (G, R) float32.
        zero: (G, R) float32.
        groups: (B,) group of each column.
        codes: (B, R) uint8, filled.
        errors: (B, R) float32, filled with error / diagonal.
        losses: (R,) float64, added to.
        top: greatest code.
    """
    lanes = work.shape[1]
    for column in range(work.shape[0]):
        values, error, code = work[column], errors[column], codes[column]
        step, middle, diagonal = scale[groups[column]], zero[groups[column]], upper[column, column]
        for row in range(lanes):
            # a scale of 0 has the zero as its only code: dividing by 1 and multiplying by 0 gives that without a branch
            divisor = _ONE if step[row] == _ZERO else step[row]
            rounded = np.rint((values[row] if step[row] != _ZERO else _ZERO) / divisor) + middle[row]
            chosen = min(max(rounded, _ZERO), top)
            code[row] = np.uint8(chosen)
            error[row] = (values[row] - step[row] * (chosen - middle[row])) / diagonal
            losses[row] += np.float64(error[row]) * np.float64(error[row])
        for later in range(column + 1, work.shape[0]):
            factor, target = upper[column, later], work[later]
            for row in range(lanes):
                target[row] -= error[row] * factor


@compiled("contract", "reassoc")
def _sums(
    weight: Array, codes: Array, diagonal: Array, scale: np.float32, zero: np.float32
) -> tuple[np.float64, np.float64]:
    # in float64: the square of an error below 1e-19 is nothing in float32
    square, power = np.float64(0), np.float64(0)
    for column in range(weight.size):
        value = np.float64(weight[column])
        error = np.float64(weight[column] - scale * (np.float32(codes[column]) - zero))
        square += error * error
        power += value * value * np.float64(diagonal[column])
    return square, power


@compiled()
def error_and_power(
    weight: Array, codes: Array, scale: Array, zero: Array, diagonal: Array, size: int
) -> tuple[float, float]:
    """Sums (weight - what the codes stand for)^2, and weight^2 times its column's `diagonal`.

    Args:
        weight: (n, K) float32.
        codes: (n, K) uint8.
        scale: (n, G) float32.
        zero: (n, G) uint8.
        diagonal: (K,) float32.
        size: columns of a group.
    """
    square, power = 0.0, 0.0
    for row in range(weight.shape[0]):
        for group in range(scale.shape[1]):
            part = slice(group * size, (group + 1) * size)
            sums = _sums(
                weight[row, part], codes[row, part], diagonal[part], scale[row, group], np.float32(zero[row, group])
            )
            square, power = square + sums[0], power + sums[1]
    return square, power
