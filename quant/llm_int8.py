"""8-bit weights in the arithmetic of bitsandbytes' LLM.int8(): one absmax per row and codes in [-127, 127].

Sources: LLM.int8() (arXiv 2208.07339); bitsandbytes nn/modules.py (Int8Params), _ops.py (int8_vectorwise_dequant), csrc
kInt8VectorQuant. A training multiplies in int8 and scales the sums, so it never rounds a dequantized weight to 16 bits.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import InputError
from quantpress.quant.floats import count_nonfinite, to_float16, to_float32

__all__ = ["dequantize_int8", "quantize_int8"]

Float32Array: TypeAlias = NDArray[np.float32]

_ONE_127TH = np.float32(1 / 127)


def quantize_int8(values: NDArray[Any]) -> tuple[NDArray[np.int8], Float32Array]:
    """Quantizes rows as LLM.int8() does; it rounds a weight to float16 first, whatever its type.

    Args:
        values: (N, K) float32, float16 or bfloat16.

    Returns:
        (N, K) int8 in [-127, 127], and the rows' absmax (N,) float32, which checkpoints call SCB.

    Raises:
        InputError: values that are NaN or infinite, or too large for float16.
    """
    wide = to_float32(to_float16(values))
    absmax = np.max(np.abs(wide), axis=1, initial=0.0)
    if not np.isfinite(absmax).all():
        raise InputError(f"{count_nonfinite(wide)} values are NaN, infinite, or beyond float16, which LLM.int8() uses")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # both __fdividef and torch's division of a number by a tensor multiply with the reciprocal
        scaled = np.rint(wide * (np.float32(1) / absmax * np.float32(127))[:, None])
    return np.nan_to_num(scaled, copy=False, nan=0.0).astype(np.int8), absmax


def dequantize_int8(codes: NDArray[np.int8], absmax: Float32Array) -> Float32Array:
    """Gives (N, K) float32: `code * absmax / 127`, multiplied from left to right as int8_vectorwise_dequant does."""
    out = codes.astype(np.float32)
    out *= absmax[:, None]
    out *= _ONE_127TH
    return out
