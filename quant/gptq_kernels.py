"""GPTQ's inner loop, compiled by numba: rows are independent, so each thread takes rows and keeps one in its cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.grid_kernels import nearest_code

__all__ = ["quantize_block"]

Array = NDArray[Any]


@compiled(parallel=True)
def quantize_block(
    work: Array, upper: Array, scale: Array, zero: Array, groups: Array, codes: Array, order: Array, errors: Array,
    losses: Array, top: int,
) -> None:  # fmt: skip
    """Quantizes a block of columns and passes each error on to the columns of the block that follow.

    Args:
        work: (N, B) float32 view of the weights in visiting order; changed.
        upper: (B, B) float32 diagonal block of U.
        scale: (N, G) float32.
        zero: (N, G) uint8.
        groups: (B,) group of each column.
        codes: (N, K) uint8, columns `order` are filled.
        order: (B,) column that each of the block's columns is.
        errors: (N, >= B) float32, filled with error / diagonal.
        losses: (N,) float64, added to.
        top: greatest code.
    """
    count = upper.shape[0]
    for row in prange(work.shape[0]):
        values = work[row].copy()
        loss = 0.0
        for column in range(count):
            step = scale[row, groups[column]]
            middle = np.float32(zero[row, groups[column]])
            code = nearest_code(values[column], step, middle, np.float32(top))
            error = (values[column] - step * (code - middle)) / upper[column, column]
            codes[row, order[column]] = np.uint8(code)
            errors[row, column] = error
            loss += 0.5 * error * error
            for later in range(column + 1, count):
                values[later] -= error * upper[column, later]
        losses[row] += loss
