"""Matrices that GGUF holds head by head: llama.cpp multiplies by the projections from a latent in another order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.preflight import Binding
from quantpress.convert.row_order import ReadRows

__all__ = ["by_heads", "per_head"]


def by_heads(binding: Binding, hyper: Hyperparameters) -> Binding:
    """Gives a row's tensor as GGUF holds it: a matrix for each head where the table says so."""
    row, layer, tensor = binding
    return (row, layer, per_head(tensor, hyper.heads, row.gguf_heads)) if row.gguf_heads else binding


def per_head(tensor: LazyTensor, heads: int, how: str) -> LazyTensor:
    """Gives a matrix for each head, read head by head.

    Args:
        tensor: (N, K), the rows of one head after those of another.
        heads: how many.
        how: as `TensorSpec.gguf_heads`: "rows" (heads, N / heads, K), "columns" (heads, K, N / heads).
    """
    size, columns = tensor.shape[0] // heads, tensor.shape[1]

    def reader(read: ReadRows) -> ReadRows:
        def rows(start: int, stop: int) -> Array:
            values = read(start * size, stop * size).reshape(stop - start, size, columns)
            return values if how == "rows" else np.ascontiguousarray(values.transpose(0, 2, 1))

        return rows

    shape = (heads, size, columns) if how == "rows" else (heads, columns, size)
    wide = None if tensor.wide_rows is None else reader(tensor.wide_rows)
    return replace(tensor, shape=shape, read_rows=reader(tensor.read_rows), wide_rows=wide)
