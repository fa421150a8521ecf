"""Rounds float64 to the types of checkpoints once: a detour over float32 would round some values twice.

A value that float32 rounds onto the midpoint of two numbers of a narrower type has lost which side it came from. Only
these can end up wrong (about one in 65,000 for bfloat16), so float32 is used and they are repaired from the float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import InputError
from quantpress.quant.floats import BFLOAT16, CHUNK, Array, to_float16, widen

__all__ = ["Rounding", "from_float64", "widen_to_float64"]

_FLOAT16 = np.dtype(np.float16)
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)

# As many bytes of float64 as `CHUNK` has of float32.
_PIECE = CHUNK // 2


def from_float64(array: NDArray[np.float64], dtype: np.dtype[Any]) -> Array:
    """Round to nearest, ties to even, with one rounding.

    Args:
        array: any shape, float64.
        dtype: float64, float32, float16, bfloat16 or an 8-bit float of ml_dtypes.

    Returns:
        The same shape in C order. NaN stays NaN; what is beyond the type becomes infinite, or NaN in types without
        infinity, so that `count_nonfinite` sees it.

    Raises:
        InputError: the dtype is not one of these.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    out = np.empty(flat.size, dtype)
    rounding = Rounding(dtype, min(_PIECE, flat.size))
    for start in range(0, flat.size, _PIECE):
        rounding.apply(flat[start : start + _PIECE], out[start : start + _PIECE])
    return out.reshape(np.shape(array))


def widen_to_float64(flat: Array, out: NDArray[np.float64], single: NDArray[np.float32]) -> None:
    """Convert `flat` (n,), native byte order, into `out` (n,) float64; `single` is (n,) float32 scratch.

    Raises:
        InputError: the dtype is not a float type.
    """
    if flat.dtype in (_FLOAT32, _FLOAT64):
        np.copyto(out, flat)
        return
    if flat.dtype.kind in "iub":
        raise InputError(f"dtype {flat.dtype} is not a float type")
    widen(flat, single)
    np.copyto(out, single)


class Rounding:
    """Rounds piece after piece of a long array to one type, in the same scratch; for one thread.

    Args:
        dtype: as for `from_float64`.
        size: most values of a piece.
    """

    def __init__(self, dtype: np.dtype[Any], size: int) -> None:
        self.dtype = np.dtype(dtype)
        plain = self.dtype in (_FLOAT64, _FLOAT32, _FLOAT16, BFLOAT16)
        if not plain and not (self.dtype.itemsize == 1 and self.dtype.name.startswith("float8")):
            raise InputError(f"float64 cannot be rounded to dtype {dtype}")
        narrow = size if self.dtype not in (_FLOAT32, _FLOAT64) else 0
        self._single = np.empty(narrow, np.float32)
        self._low = np.empty(narrow, np.uint16)
        self._hit = np.empty(narrow, np.bool_)

    def apply(self, flat: NDArray[np.float64], out: Array) -> None:
        """Round `flat` (n,) into `out` (n,) of the type."""
        if not flat.size:
            return
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if self.dtype in (_FLOAT32, _FLOAT64):
                np.copyto(out, flat, casting="unsafe")
            elif self.dtype == BFLOAT16:
                self._to_bfloat16(flat, out.view(np.uint16))
            else:
                single = self._to_odd_float32(flat)
                np.copyto(out, to_float16(single) if self.dtype == _FLOAT16 else single.astype(self.dtype))

    def _to_bfloat16(self, flat: NDArray[np.float64], out: NDArray[np.uint16]) -> None:
        """Round half away from zero in float32, then repair the midpoints: three passes instead of six."""
        single, low, hit = self._single[: flat.size], self._low[: flat.size], self._hit[: flat.size]
        np.copyto(single, flat, casting="unsafe")
        bits = single.view(np.uint32)
        if np.isnan(np.maximum.reduce(single)):
            nan = np.flatnonzero(np.isnan(single))
            bits[nan] = bits[nan] & 0xFFFF0000 | 0x400000  # quiet, and no carry out of the fraction
        np.add(bits, 0x8000, out=bits)
        np.copyto(low, bits, casting="unsafe")
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")
        np.equal(low, 0, out=hit)
        tied = np.flatnonzero(hit)
        if tied.size:
            upper = out[tied]
            midpoint = np.abs(((upper.astype(np.uint32) << 16) - 0x8000).view(np.float32).astype(np.float64))
            exact = np.abs(flat[tied])
            out[tied] = upper - ((exact < midpoint) | ((exact == midpoint) & (upper & 1 == 1)))

    def _to_odd_float32(self, flat: NDArray[np.float64]) -> NDArray[np.float32]:
        """Give float32 that is beside, never on, a midpoint of a type with fewer than 12 bits unless the value is."""
        single, low, hit = self._single[: flat.size], self._low[: flat.size], self._hit[: flat.size]
        np.copyto(single, flat, casting="unsafe")
        bits = single.view(np.uint32)
        # Midpoints of float16 have 12 zero bits at the end, or more where the target is subnormal or narrower.
        np.copyto(low, bits, casting="unsafe")
        np.left_shift(low, 4, out=low)
        np.equal(low, 0, out=hit)
        suspects = np.flatnonzero(hit)
        if suspects.size:
            exact, rounded = np.abs(flat[suspects]), np.abs(single[suspects].astype(np.float64))
            moved = bits[suspects]
            moved += exact > rounded
            moved -= exact < rounded
            bits[suspects] = moved
        return single
