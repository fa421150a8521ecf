"""Grids for groups of weights: which scale and zero a group gets, and the codes its weights are rounded to.

The scale is rounded to the type it is stored in before a code is chosen, so codes are nearest against what a reader
multiplies with. Symmetric grids are full-range signed, as ggml's quantize_row_q4_0_ref and ONNX Runtime's symmetric
MatMulNBits: scale = signed absmax / -2^(bits - 1), so that the greatest weight is hit exactly by the code 0. Asymmetric
ones span the group's least and greatest weight and always hold 0 exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError, UsageError
from quantpress.quant.qtensor import BITS, QuantizedTensor, group_count
from quantpress.quant.workers import Workers, chunks

__all__ = ["SCALE_ROUNDING", "SCALE_TYPES", "Grid", "fit", "joined", "nearest_codes", "round_to_nearest"]

Array = NDArray[Any]

SCALE_TYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}

# significand bits and the exponent of the least subnormal, by which the kernels round a scale
SCALE_ROUNDING = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149)}

_ROWS = 256  # of a chunk that one worker does at once


@dataclass(frozen=True, slots=True)
class Grid:
    """What kind of grid a matrix gets.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or -1 for a whole row.
        symmetric: no zero is stored.
        scale_type: "F16", "BF16" or "F32", the type of the stored scales.
        clip_search: choose among shrunk ranges the one with the least squared error instead of the full range.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_type: str = "F16"
    clip_search: bool = False

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: bits, group size or scale type that do not exist.
        """
        if self.bits not in BITS:
            raise UsageError(f"bits {self.bits}: must be one of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group size {self.group_size}: must be a positive number, or -1 for a whole row")
        if self.scale_type not in SCALE_TYPES:
            raise UsageError(f"scale type {self.scale_type}: must be one of {', '.join(SCALE_TYPES)}")

    def group(self, columns: int) -> int:
        """Columns of a group in a row of so many."""
        return columns if self.group_size == -1 else min(self.group_size, columns)


def fit(
    weight: NDArray[np.float32], grid: Grid, importance: NDArray[np.float32] | None = None
) -> tuple[Array, NDArray[np.uint8] | None]:
    """Chooses scale and zero of every group.

    Args:
        weight: (N, K) float32, finite.
        grid: what kind of grid.
        importance: (K,) float32 weights of the squared errors in the clip search; equal ones by default.

    Returns:
        Scale (N, G) in the stored type and zero (N, G), None for symmetric grids.

    Raises:
        LayoutError: a scale that the stored type cannot hold.
    """
    from quantpress.quant.grid_kernels import fit_groups

    rows, columns = weight.shape
    size = grid.group(columns)
    scale = np.empty((rows, group_count(columns, size)), np.float32)
    zero = np.empty(scale.shape, np.uint8)
    weights = np.ones(columns, np.float32) if importance is None else _scaled(importance)
    precision, least = SCALE_ROUNDING[grid.scale_type]
    fit_groups(
        np.ascontiguousarray(weight), weights, scale, zero, size, grid.bits, grid.symmetric, grid.clip_search,
        precision, least,
    )  # fmt: skip
    with np.errstate(over="ignore"):
        stored = scale.astype(SCALE_TYPES[grid.scale_type])
    if not np.isfinite(stored).all():
        raise LayoutError(f"scales up to {float(np.abs(scale).max()):.3g} are too large for {grid.scale_type}")
    farthest = np.abs(scale, dtype=np.float64) * np.maximum(zero, (1 << grid.bits) - 1 - zero)
    if (farthest > np.finfo(np.float32).max).any():
        raise LayoutError(f"values of codes up to {float(farthest.max()):.3g} are too large for float32")
    return stored, None if grid.symmetric else zero


def _scaled(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Brings the greatest below 1 by a power of two: sums of any importance stay inside float32."""
    _, exponent = np.frexp(importance.max(initial=0))
    scaled: NDArray[np.float32] = np.ldexp(importance, -exponent).astype(np.float32)
    return scaled


def round_to_nearest(
    weight: NDArray[np.float32], grid: Grid, threads: int = 1, *, importance: NDArray[np.float32] | None = None
) -> QuantizedTensor:
    """Quantizes a matrix by rounding each weight to the nearest value of its group's grid (RTN).

    Args:
        weight: (N, K) float32, finite.
        grid: what kind of grid.
        threads: workers; the bytes do not depend on it.
        importance: (K,) float32 weights of the squared errors in the clip search; equal ones by default.

    Raises:
        LayoutError: a scale that the stored type cannot hold.
    """
    with Workers(threads) as workers:
        parts = workers.run(partial(_round_rows, weight[rows], grid, importance) for rows in chunks(len(weight), _ROWS))
    return joined(parts, grid, weight.shape[1])


def joined(
    parts: Sequence[tuple[NDArray[np.uint8], Array, NDArray[np.uint8] | None]], grid: Grid, columns: int
) -> QuantizedTensor:
    """Puts codes, scales and zeros of chunks of rows together.

    Raises:
        LayoutError: there are no weights.
    """
    if not parts or not columns:
        raise LayoutError("a matrix that has no weights cannot be quantized")
    codes, scale, zero = zip(*parts, strict=True)
    zeros = None if grid.symmetric else np.concatenate(zero)
    return QuantizedTensor(np.concatenate(codes), np.concatenate(scale), zeros, grid.bits, grid.group(columns))


def _round_rows(
    weight: NDArray[np.float32], grid: Grid, importance: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], Array, NDArray[np.uint8] | None]:
    weight = np.ascontiguousarray(weight)
    scale, zero = fit(weight, grid, importance)
    zeros = np.full(scale.shape, 1 << (grid.bits - 1), np.uint8) if zero is None else zero
    return nearest_codes(weight, scale.astype(np.float32), zeros, grid), scale, zero


def nearest_codes(
    weight: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.uint8], grid: Grid
) -> NDArray[np.uint8]:
    """Gives the codes (N, K) whose values are nearest to `weight` (N, K); `scale` and `zero` are (N, G)."""
    from quantpress.quant.grid_kernels import choose_codes

    codes = np.empty(weight.shape, np.uint8)
    choose_codes(np.ascontiguousarray(weight), scale, zero, codes, grid.group(weight.shape[1]), (1 << grid.bits) - 1)
    return codes
