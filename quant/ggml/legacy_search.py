"""Q4_0, Q4_1, Q5_0 and Q5_1 with importance: scales (and minima) that are searched for the least weighted error.

Source: quantize_row_q4_0_impl and its neighbours in llama.cpp's ggml-quants.c; the bytes are libggml's. What an error
of a weight costs depends on the mean square of its whole row, so a row may not be cut. Without importance these types
are encoded by `legacy`, which is another algorithm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.minimum_search import encode_minimum
from quantpress.quant.ggml.signed_search import encode_signed
from quantpress.quant.ggml.tiles import put_halves, squares, writable

__all__ = ["search_q4_0", "search_q4_1", "search_q5_0", "search_q5_1"]

Array = NDArray[Any]


def search_q4_0(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q4_0, whole rows with importance; see `search.Search`."""
    return _search_signed(values, importance, first, 8, out)


def search_q5_0(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q5_0, whole rows with importance; see `search.Search`."""
    return _search_signed(values, importance, first, 16, out)


def search_q4_1(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q4_1, whole rows with importance; see `search.Search`."""
    return _search_minimum(values, importance, first, 15, out)


def search_q5_1(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to Q5_1, whole rows with importance; see `search.Search`."""
    return _search_minimum(values, importance, first, 31, out)


def _search_signed(values: Array, importance: Array | None, first: int, top: int, out: Array) -> int:
    values, costs, energy = _prepared(values, importance, first)
    scales = np.empty(len(values), np.float32)
    encode_signed(values, costs, energy, top, scales, out)
    return int(np.count_nonzero(put_halves(scales, out)))


def _search_minimum(values: Array, importance: Array | None, first: int, top: int, out: Array) -> int:
    values, costs, energy = _prepared(values, importance, first)
    scales, minima = np.empty(len(values), np.float32), np.empty(len(values), np.float32)
    encode_minimum(values, costs, energy, top, scales, minima, out)
    return int(np.count_nonzero(put_halves(scales, out) | put_halves(minima, out[:, 2:])))


def _prepared(values: Array, importance: Array | None, first: int) -> tuple[Array, Array, Array]:
    """Gives values and importance that kernels may take, and the mean square of each block's row, (B,) float32."""
    if importance is None or first % len(importance) or len(values) % len(importance):
        raise ValueError("whole rows and their importance are wanted")
    values = writable(values)
    rows = values.reshape(-1, importance.size)
    energy = np.empty(len(rows), np.float32)
    squares(rows, energy)
    energy /= np.float32(importance.size)
    return values, writable(importance), np.repeat(energy, len(importance))
