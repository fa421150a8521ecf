"""Rounds float64 to the types of checkpoints once: a detour over float32 would round some values twice.

A value that float32 rounds onto the midpoint of two numbers of a narrower type has lost which side it came from. Only
these can end up wrong (about one in 65,000 for bfloat16), so float32 is used and they are repaired from the float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import InputError
from quantpress.quant.floats import BFLOAT16, CHUNK, Array, widen

__all__ = ["ROUNDING_SLACK", "check_target", "from_float64", "round_float64", "widen_to_float64"]

_FLOAT16 = np.dtype(np.float16)
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)

_PIECE = CHUNK // 2  # values; as many bytes of float64 as `CHUNK` has of float32

ROUNDING_SLACK = 2  # float64 of scratch beside one for each value: 7 bytes a value, aligned


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
    dtype = np.dtype(dtype)
    check_target(dtype)
    flat = np.ascontiguousarray(array).reshape(-1)
    out = np.empty(flat.size, dtype)
    scratch = np.empty(min(_PIECE, flat.size) + ROUNDING_SLACK)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, flat.size, _PIECE):
            round_float64(flat[start : start + _PIECE].copy(), out[start : start + _PIECE], scratch)
    return out.reshape(np.shape(array))


def check_target(dtype: np.dtype[Any]) -> None:
    """Checks that `round_float64` can round to a type.

    Raises:
        InputError: it cannot.
    """
    plain = dtype in (_FLOAT64, _FLOAT32, _FLOAT16, BFLOAT16)
    if not plain and not (dtype.itemsize == 1 and dtype.name.startswith("float8")):
        raise InputError(f"float64 cannot be rounded to dtype {dtype}")


def round_float64(flat: NDArray[np.float64], out: Array, scratch: NDArray[np.float64]) -> None:
    """Round `flat` (n,) into `out` (n,) in one pass; for callers that cut into pieces themselves.

    They also silence numpy (`np.errstate`) for overflow, underflow and NaN, once for all pieces: it takes microseconds.

    Args:
        flat: float64; what it holds is lost.
        out: of a type that `check_target` allows; contiguous.
        scratch: (n + ROUNDING_SLACK,) or longer, contiguous.
    """
    if not flat.size:
        return
    if out.dtype in (_FLOAT32, _FLOAT64):
        np.copyto(out, flat, casting="unsafe")
    elif out.dtype == BFLOAT16:
        _to_bfloat16(flat, out.view(np.uint16), scratch)
    elif out.dtype == _FLOAT16:
        _to_float16(flat, out.view(np.uint16), scratch)
    else:
        np.copyto(out, _to_odd_float32(flat, scratch).astype(out.dtype))


def widen_to_float64(flat: Array, out: NDArray[np.float64], scratch: NDArray[np.float64]) -> None:
    """Convert `flat` (n,), native byte order, into `out` (n,) float64; callers silence numpy as for `round_float64`.

    Args:
        flat: any float type.
        out: float64.
        scratch: (n / 2,) rounded up, or longer, contiguous.

    Raises:
        InputError: the dtype is not a float type.
    """
    if flat.dtype.kind in "iub":
        raise InputError(f"dtype {flat.dtype} is not a float type")
    source = flat
    if flat.dtype not in (_FLOAT32, _FLOAT64):
        source = scratch.view(np.float32)[: flat.size]
        widen(flat, source)
    np.copyto(out, source)


def _to_bfloat16(flat: NDArray[np.float64], out: NDArray[np.uint16], scratch: NDArray[np.float64]) -> None:
    """Round half away from zero in float32, then repair the midpoints: three passes instead of six."""
    single, low, hit = _split(scratch, flat.size)
    np.copyto(single, flat, casting="unsafe")
    bits = single.view(np.uint32)
    if np.isnan(np.maximum.reduce(single)):
        nan = np.flatnonzero(np.isnan(single))
        bits[nan] = bits[nan] & 0xFFFF0000 | 0x400000  # quiet, and no carry out of the fraction
    np.add(bits, 0x8000, out=bits)
    np.copyto(low, bits, casting="unsafe")
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="unsafe")
    tied = _zeros(low, hit)
    if tied.size:
        _untie(out, tied, flat, 16)


def _to_float16(flat: NDArray[np.float64], out: NDArray[np.uint16], scratch: NDArray[np.float64]) -> None:
    """The same for float16, on values times 2^-112: then its normal numbers are float32's and its subnormals too.

    The integer image of such a float32 is that of the float16 with 13 bits more at the end.
    """
    np.multiply(flat, 2.0**-112, out=flat)
    single, low, hit = _split(scratch, flat.size)
    np.copyto(single, flat, casting="unsafe")
    limit = 65520.0 * 2.0**-112  # from here on rounding gives infinity
    if not (np.maximum.reduce(single) < limit and np.minimum.reduce(single) > -limit):
        outside = np.flatnonzero(~(np.abs(single) < limit))
    else:
        outside = None
    bits = single.view(np.uint32)
    np.add(bits, 0x1000, out=bits)
    np.copyto(low, bits, casting="unsafe")
    np.left_shift(low, 3, out=low)
    tied = _zeros(low, hit)
    np.right_shift(bits, 13, out=bits)
    np.copyto(out, bits, casting="unsafe")
    np.right_shift(bits, 3, out=bits)
    np.copyto(low, bits, casting="unsafe")
    np.bitwise_and(low, 0x8000, out=low)
    np.bitwise_or(out, low, out=out)
    if tied.size:
        _untie(out, tied, flat, 13)
    if outside is not None:
        out[outside] = (flat[outside] * 2.0**112).astype(np.float16).view(np.uint16)


def _to_odd_float32(flat: NDArray[np.float64], scratch: NDArray[np.float64]) -> NDArray[np.float32]:
    """Give float32 that lies on a midpoint of a type with fewer than 12 bits only where the value does."""
    single, low, hit = _split(scratch, flat.size)
    np.copyto(single, flat, casting="unsafe")
    bits = single.view(np.uint32)
    # Midpoints of float16 have 12 zero bits at the end, or more where the target is subnormal or narrower.
    np.copyto(low, bits, casting="unsafe")
    np.left_shift(low, 4, out=low)
    suspects = _zeros(low, hit)
    if suspects.size:
        exact, rounded = np.abs(flat[suspects]), np.abs(single[suspects].astype(np.float64))
        moved = bits[suspects]
        moved += exact > rounded
        moved -= exact < rounded
        bits[suspects] = moved
    return single


def _untie(out: NDArray[np.uint16], tied: NDArray[np.int64], flat: NDArray[np.float64], shift: int) -> None:
    """Correct numbers that were rounded up from a midpoint in float32, where float64 lies below it or even is below.

    `shift` is how many bits more a float32 has.
    """
    upper = out[tied]
    midpoint = (np.left_shift(upper & 0x7FFF, shift, dtype=np.uint32) - (1 << shift - 1)).view(np.float32)
    exact = np.abs(flat[tied])
    out[tied] = upper - ((exact < midpoint) | (exact == midpoint) & upper)


def _split(
    scratch: NDArray[np.float64], size: int
) -> tuple[NDArray[np.float32], NDArray[np.uint16], NDArray[np.bool_]]:
    """Cut scratch into (n,) float32, (n,) uint16 and bool for n rounded up to a multiple of 8."""
    places = scratch.view(np.uint8)
    flags = -(-6 * size // 8) * 8
    single, low = places[: 4 * size].view(np.float32), places[4 * size : 6 * size].view(np.uint16)
    return single, low, places[flags : flags + -(-size // 8) * 8].view(np.bool_)


def _zeros(low: NDArray[np.uint16], hit: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Find where `low` (n,) is 0; such are rare, so eight flags are looked at together."""
    hit[low.size :] = False
    np.equal(low, 0, out=hit[: low.size])
    found = np.flatnonzero(hit.view(np.uint64))
    places: NDArray[np.int64] = (found[:, None] * 8 + np.arange(8)).reshape(-1)
    return places[hit[places]]
