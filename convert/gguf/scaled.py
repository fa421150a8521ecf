"""Rows that a GGUF file holds multiplied by a factor that llama.cpp's graph leaves out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import Array
from quantpress.convert.preflight import Binding
from quantpress.quant.floats import to_float32

__all__ = ["scaled"]


def scaled(binding: Binding, hyper: Hyperparameters) -> Binding:
    """Gives a binding whose tensor holds values times the row's `gguf_scale`, in float32; others as they are."""
    row, layer, tensor = binding
    factor = float(getattr(hyper, row.gguf_scale)) if row.gguf_scale else 1.0
    if factor == 1.0:
        return binding

    def read(start: int, stop: int) -> Array:
        # the product of two float32 numbers is exact in float64, and rounded once
        values = to_float32(tensor.exact_rows(start, stop)).astype(np.float64) * factor
        return values.astype(np.float32)

    return row, layer, replace(tensor, dtype="F32", read_rows=read, wide_rows=None)
