"""HQQ: scales and zeros that make a robust norm of the weights' errors small, without any data.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the norm |e|^p with
p < 1 cares less for outliers than squared errors do; splitting it into a penalized error and a proximal step gives the
zero by alternation. Here p = 3/4 (theirs is 0.7: powers of it are square roots), the errors are measured in steps so
that nothing depends on the weights' size, the zero ends as an integer, which every format can hold, and the scale is
then fitted anew. A group keeps the scale and zero of the clip search where these have the least norm.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.grid import SCALE_ROUNDING, SCALE_TYPES, Grid, fit, joined, nearest_codes
from quantpress.quant.qtensor import QuantizedTensor
from quantpress.quant.workers import Workers, chunks

__all__ = ["half_quadratic"]

Array = NDArray[Any]

_ROWS = 256  # of a chunk that one worker does at once


def half_quadratic(weight: NDArray[np.float32], grid: Grid, threads: int = 1) -> QuantizedTensor:
    """Quantizes a matrix.

    Args:
        weight: (N, K) float32, finite.
        grid: what kind of grid; there is always a clip search.
        threads: workers; the bytes do not depend on it.

    Raises:
        LayoutError: a scale that the stored type cannot hold.
    """
    with Workers(threads) as workers:
        parts = workers.run(partial(_rows, weight[rows], grid) for rows in chunks(len(weight), _ROWS))
    return joined(parts, grid, weight.shape[1])


def _rows(weight: NDArray[np.float32], grid: Grid) -> tuple[NDArray[np.uint8], Array, NDArray[np.uint8] | None]:
    from quantpress.quant.hqq_kernels import improve_groups

    weight = np.ascontiguousarray(weight)
    starts, _ = fit(weight, replace(grid, clip_search=False))
    stored, zero = fit(weight, replace(grid, clip_search=True))
    scale = stored.astype(np.float32)
    zeros = np.full(scale.shape, 1 << (grid.bits - 1), np.uint8) if zero is None else zero
    precision, least = SCALE_ROUNDING[grid.scale_type]
    improve_groups(
        weight, scale, zeros, starts.astype(np.float32), grid.group(weight.shape[1]), grid.bits, grid.symmetric,
        precision, least,
    )  # fmt: skip
    return (
        nearest_codes(weight, scale, zeros, grid),
        scale.astype(SCALE_TYPES[grid.scale_type]),
        (None if grid.symmetric else zeros),
    )
