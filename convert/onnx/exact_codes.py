"""Codes of a quantized checkpoint on their way into a graph: scales in the activations' type, columns in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import to_float32
from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["column_order", "exact_scale", "with_columns"]


def exact_scale(scale: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Gives scales in another type, C-contiguous, bit for bit the same numbers.

    Args:
        scale: (N, G) float16, bfloat16 or float32.
        dtype: float32 or float16.

    Raises:
        LayoutError: a scale is no number of the type.
    """
    wide = to_float32(scale)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = np.ascontiguousarray(wide, dtype)
    lost = stored.astype(np.float32) != wide
    if lost.any():
        raise LayoutError(f"the scale {float(wide[lost][0]):.9g} is no {dtype.name}; use --compute-type fp32")
    return stored


def column_order(tensor: QuantizedTensor) -> NDArray[np.int64] | None:
    """Gives the order of the columns, (K,), in which those of a group are neighbours; None where they are already.

    Columns of a group keep their order, so the order follows from `g_idx` alone.

    Raises:
        LayoutError: groups of different sizes, which blocks of one size cannot hold.
    """
    if tensor.g_idx is None or tensor.groups == 1:
        return None
    expected = np.arange(tensor.columns) // tensor.group_size
    order = np.argsort(tensor.g_idx, kind="stable")
    if not np.array_equal(tensor.g_idx[order], expected):
        counts = np.bincount(tensor.g_idx, minlength=tensor.groups)
        raise LayoutError(
            f"its groups have {counts.min()} to {counts.max()} columns (g_idx), and only groups of {tensor.group_size}"
            " can be stored; export the dequantized weights with --precision fp16 or bf16"
        )
    return None if np.array_equal(order, np.arange(tensor.columns)) else order


def with_columns(tensor: QuantizedTensor, order: NDArray[np.int64] | None) -> QuantizedTensor:
    """Gives the matrix with its columns in an order of `column_order`, which goes on its inputs too."""
    codes = tensor.codes if order is None else tensor.codes[:, order]
    return replace(tensor, codes=codes, g_idx=None)
