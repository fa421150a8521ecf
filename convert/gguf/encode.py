"""Turns rows of a checkpoint into the bytes of a GGUF type, and measures on a sample what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from quantpress.convert.checkpoint import Array
from quantpress.quant.floats import to_float32
from quantpress.quant.ggml.codec import dequantize, quantize_rows
from quantpress.quant.ggml.on_device import quantize_rows_on_device

_SAMPLED_ROWS = 8  # rows of each chunk that are decoded again: about one in a hundred of a large tensor


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as the file holds them.

    Attributes:
        data: (..., row bytes) uint8, C-contiguous.
        squared_error: sum of squared differences of the sampled rows from the source.
        squared_values: sum of squares of the sampled rows.
        kept: the codes of a quantized source, untouched.
    """

    data: Array
    squared_error: float
    squared_values: float
    kept: bool = False


def relative_error(squared_error: float, squared_values: float) -> float:
    """Root mean square error over root mean square; 0 where nothing changed."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squared_values) if squared_values else math.inf


def encode_rows(
    rows: Array, kind: str, *, offset: float, sample: bool, importance: Array | None = None, device: str = "cpu"
) -> Encoded:
    """Encodes rows.

    Args:
        rows: (n, ..., K) or (K,) of any number type, C-contiguous; K fits the type.
        kind: name of a type that can be written.
        offset: added to every value first, in float32.
        sample: decode some rows again and compare them.
        importance: (1, K) float32, what an error of a column costs; None where nothing is known.
        device: where to search; the bytes do not depend on it. What is sampled is decoded by the processor: it is a
            hundredth of the rows.

    Raises:
        LayoutError: finite values that the type cannot hold.
        OutputError: what a device needs is not installed.
    """
    if offset:
        rows = to_float32(rows) + np.float32(offset)
    weight = None if importance is None else importance[0]
    on_device = partial(quantize_rows_on_device, device=device)
    data = (quantize_rows if device == "cpu" else on_device)(kind, rows, weight)
    if not sample or np.may_share_memory(data, rows):
        return Encoded(data, 0.0, 0.0)
    return Encoded(data, *sampled_error(rows, data, kind))


def sampled_error(rows: Array, data: Array, kind: str) -> tuple[float, float]:
    """Decodes some rows again: sums of squares of what they differ by, and of their values."""
    step = max(1, len(rows) // _SAMPLED_ROWS) if rows.ndim > 1 else 1
    taken = slice(None, None, step)
    source = to_float32(rows[taken]).reshape(-1)
    back = dequantize(kind, data[taken], rows.shape[-1]).reshape(-1)
    with np.errstate(all="ignore"):  # non-finite values may be allowed
        error = back - source
        return _squares(error), _squares(source)


def _squares(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())
