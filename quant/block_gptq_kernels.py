"""The column loop of GPTQ inside ggml's blocks, compiled by numba; rows lie side by side as in `gptq_kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled

__all__ = ["round_columns"]

Array = NDArray[Any]

_ZERO = np.float32(0)
_ONE = np.float32(1)


@compiled("contract")
def round_columns(
    work: Array, upper: Array, step: Array, offset: Array, groups: Array, levels: Array, codes: Array, errors: Array,
    even: bool,
) -> None:  # fmt: skip
    """Finds the codes of some columns and passes each error on to those of them that follow.

    Args:
        work: (B, R) float32, the columns in visiting order; changed.
        upper: (B, B) float32 diagonal block of U.
        step: (G, R) float32.
        offset: (G, R) float32.
        groups: (B,) group of each column.
        levels: (L,) float32 rising.
        codes: (B, R) uint8, filled.
        errors: (B, R) float32, filled with error / diagonal.
        even: whether levels are 1 apart.
    """
    lanes, low, top = work.shape[1], levels[0], np.float32(levels.size - 1)
    bounds = (levels[1:] + levels[:-1]) / np.float32(2)
    for column in range(work.shape[0]):
        values, error, code = work[column], errors[column], codes[column]
        scale, shift, diagonal = step[groups[column]], offset[groups[column]], upper[column, column]
        for row in range(lanes):
            # a step of 0 stands for the offset, whatever the code: it takes the code whose level is nearest to 0
            divisor = _ONE if scale[row] == _ZERO else scale[row]
            wanted = (values[row] - shift[row]) / divisor if scale[row] != _ZERO else _ZERO
            if even:
                chosen = min(max(np.rint(wanted - low), _ZERO), top)
                code[row] = np.uint8(chosen)
                error[row] = (values[row] - (scale[row] * (chosen + low) + shift[row])) / diagonal
            else:
                place = 0
                for bound in bounds:
                    place += wanted > bound
                code[row] = np.uint8(place)
                error[row] = (values[row] - (scale[row] * levels[place] + shift[row])) / diagonal
        for later in range(column + 1, work.shape[0]):
            factor, target = upper[column, later], work[later]
            for row in range(lanes):
                target[row] -= error[row] * factor
