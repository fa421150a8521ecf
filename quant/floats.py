"""Casts between the float types of checkpoints and the checks that must come before them.

All casts are IEEE 754 round to nearest, ties to even, and work on the integer images of the numbers: numpy's own
float16 casts run element by element and ml_dtypes' casts hold the interpreter lock. Arrays are processed in chunks that
stay in the second-level cache, so a cast of any size needs a few hundred kilobytes beside its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import InputError, LayoutError

__all__ = [
    "BFLOAT16",
    "CHUNK",
    "cast_float16",
    "count_nonfinite",
    "to_bfloat16",
    "to_float16",
    "to_float32",
    "widen",
]

Array: TypeAlias = NDArray[Any]

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

# Elements of a chunk: half a megabyte of bfloat16. Smaller ones run faster on one thread (2^16 by a tenth) but hand the
# interpreter lock from thread to thread more often than two threads can gain (measured: 2^16 0.97, 2^18 1.9 times one).
CHUNK = 1 << 18

_FLOAT16 = np.dtype(np.float16)
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)

# Smallest magnitude, as an integer image, that is infinite or NaN.
_NONFINITE_FROM = {_FLOAT16: 0x7C00, BFLOAT16: 0x7F80, _FLOAT32: 0x7F800000, _FLOAT64: 0x7FF0000000000000}

# Images of 65520, halfway between float16's largest number and 65536: from here on rounding gives infinity.
_FLOAT16_OVERFLOW_FROM = {BFLOAT16: 0x4780, _FLOAT32: 0x477FF000}


def to_float32(array: Array) -> NDArray[np.float32]:
    """Convert any number type to float32.

    Args:
        array: any shape; float64, float32, float16, bfloat16, an 8-bit float of ml_dtypes, an integer or bool; any
            byte order.

    Returns:
        The same shape, float32, C order. Float32 input in C order is returned itself, not copied.

    Raises:
        LayoutError: a finite float64 is beyond float32.
        InputError: the dtype is not a real number type.
    """
    array = _native(array)
    if array.dtype == _FLOAT32:
        return np.asarray(array, order="C")
    flat = np.ascontiguousarray(array).reshape(-1)
    out = np.empty(flat.size, np.float32)
    for start, chunk in _chunks(flat):
        widen(chunk, out[start : start + CHUNK])
    return out.reshape(array.shape)


def widen(flat: Array, out: NDArray[np.float32]) -> None:
    """Convert `flat` (n,), native byte order, into `out` (n,) float32 in one pass; for callers that chunk themselves.

    Raises:
        LayoutError: a finite float64 is beyond float32.
        InputError: the dtype is not a real number type.
    """
    dtype = flat.dtype
    if dtype == BFLOAT16:
        bits = out.view(np.uint32)
        np.copyto(bits, flat.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    elif dtype in (_FLOAT32, np.dtype(np.bool_)) or dtype.kind in "iu":
        np.copyto(out, flat, casting="unsafe")
    elif dtype == _FLOAT64:
        with np.errstate(all="ignore"):
            np.copyto(out, flat, casting="unsafe")
        if count_nonfinite(out) > count_nonfinite(flat):
            raise LayoutError("float64 value beyond 3.4e38 found, float32 cannot hold it")
    elif _is_small_float(dtype):
        np.take(_float32_table(dtype), flat.view(f"u{dtype.itemsize}"), out=out, mode="clip")
    else:
        raise InputError(f"dtype {dtype} is not a real number type")


def to_bfloat16(array: Array) -> Array:
    """Round to bfloat16; NaN stays NaN and becomes quiet (as ggml_compute_fp32_to_bf16 in llama.cpp's ggml-impl.h).

    Args:
        array: as for `to_float32`.

    Returns:
        The same shape, ml_dtypes.bfloat16, C order. Input that is bfloat16 in C order is returned itself.
    """
    array = _native(array)
    if array.dtype == BFLOAT16:
        return np.asarray(array, order="C")
    out = np.empty(array.size, np.uint16)
    scratch = np.empty(min(CHUNK, array.size), np.uint32)
    for start, chunk in _float32_images(array):
        target, rounded = out[start : start + CHUNK], scratch[: chunk.size]
        np.right_shift(chunk, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, chunk, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        np.copyto(target, rounded, casting="unsafe")
        if _top_magnitude(chunk) > _NONFINITE_FROM[_FLOAT32]:
            nan = np.flatnonzero((chunk & 0x7FFFFFFF) > _NONFINITE_FROM[_FLOAT32])
            target[nan] = (chunk[nan] >> 16) | 0x40
    return out.view(BFLOAT16).reshape(array.shape)


def to_float16(array: Array) -> NDArray[np.float16]:
    """Round to float16; finite values beyond it become infinite, which `cast_float16` counts."""
    return cast_float16(array)[0]


def cast_float16(array: Array) -> tuple[NDArray[np.float16], int]:
    """Round to float16 and count what was lost.

    Args:
        array: as for `to_float32`; bfloat16 is converted without a float32 step, float64 is rounded to float32 first.

    Returns:
        The same shape, float16, C order (input that is float16 in C order is returned itself); and how many finite
        values became infinite, which are those of magnitude 65520 and above.
    """
    array = _native(array)
    if array.dtype == _FLOAT16:
        return np.asarray(array, order="C"), 0
    if array.dtype == BFLOAT16:
        chunks, convert = _chunks(np.ascontiguousarray(array).reshape(-1).view(np.uint16)), _bfloat16_to_float16
    else:
        chunks, convert = _float32_images(array), _float32_to_float16
    out = np.empty(array.size, np.uint16)
    wide = np.empty(min(CHUNK, array.size), np.uint16 if array.dtype == BFLOAT16 else np.uint32)
    half = np.empty(wide.size, np.uint16)
    lost = 0
    for start, chunk in chunks:
        lost += convert(chunk, out[start : start + CHUNK], wide[: chunk.size], half[: chunk.size])
    return out.view(np.float16).reshape(array.shape), lost


def count_nonfinite(array: Array) -> int:
    """Count NaN and infinite values in the storage type, without a cast and without a copy of the array's size.

    Args:
        array: any shape and real number type; integers and bool are always finite.

    Raises:
        InputError: the dtype is not a real number type.
    """
    array = _native(array)
    dtype = array.dtype
    if dtype in _NONFINITE_FROM:
        bits = np.ascontiguousarray(array).reshape(-1).view(f"u{dtype.itemsize}")
        return _count_from(bits, _NONFINITE_FROM[dtype])
    if dtype.kind in "iub":
        return 0
    if _is_small_float(dtype):
        wild = ~np.isfinite(_float32_table(dtype))
        return int(np.count_nonzero(wild[np.ascontiguousarray(array).view(np.uint8)]))
    raise InputError(f"dtype {dtype} is not a real number type")


def _native(array: Array) -> Array:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _chunks(flat: Array) -> Iterator[tuple[int, Array]]:
    """Cut (n,) into pieces of `CHUNK`, each with its first index."""
    for start in range(0, flat.size, CHUNK):
        yield start, flat[start : start + CHUNK]


def _float32_images(array: Array) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Convert to float32 piece by piece; yields each piece's first index and its bits, valid until the next piece."""
    flat = np.ascontiguousarray(array).reshape(-1)
    single = np.empty(min(CHUNK, flat.size), np.float32)
    for start, chunk in _chunks(flat):
        if chunk.dtype != _FLOAT32:
            widen(chunk, single[: chunk.size])
            chunk = single[: chunk.size]
        yield start, chunk.view(np.uint32)


def _is_small_float(dtype: np.dtype[Any]) -> bool:
    return dtype == _FLOAT16 or (dtype.itemsize == 1 and dtype.name.startswith("float8"))


@cache
def _float32_table(dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """All values of an 8-bit or 16-bit float type, by their integer image."""
    bits = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        table = bits.view(dtype).astype(np.float32)
    table.flags.writeable = False
    return table


@cache
def _float16_of_bfloat16() -> NDArray[np.uint16]:
    """Integer images of float16, by the integer image of bfloat16."""
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        table = values.astype(np.float16).view(np.uint16)
    table.flags.writeable = False
    return table


def _bfloat16_to_float16(bits: Array, out: Array, wide: Array, half: Array) -> int:
    """Convert integer images, (n,) uint16 to (n,) uint16, and count finite values that became infinite.

    `wide` and `half` are (n,) uint16 scratch.

    A bfloat16 in float16's normal range [2^-14, 65536) is exact there: the fraction moves up three places, the two top
    exponent bits and the sign fall out, and the bias drops from 127 to 15, which is + 0x4000 modulo 2^16. What is
    smaller (zeros, subnormals: well under 1 % of real weights) is repaired from a table; a chunk with anything larger
    is taken from the table whole.
    """
    table = _float16_of_bfloat16()
    if _top_magnitude(bits) >= 0x4780:  # 65536
        np.take(table, bits, out=out, mode="clip")
        return _count_lost(bits & 0x7FFF, BFLOAT16)
    np.multiply(bits, 8, out=out)
    np.bitwise_and(bits, 0x8000, out=wide)
    np.bitwise_xor(wide, 0x4000, out=wide)
    np.add(out, wide, out=out)
    np.add(bits, bits, out=half)  # drops the sign
    small = np.flatnonzero(half < 2 * 0x3880)  # 2^-14
    out[small] = table[bits[small]]
    return 0


def _float32_to_float16(bits: Array, out: Array, wide: Array, half: Array) -> int:
    """Convert integer images, (n,) uint32 to (n,) uint16, and count finite values that became infinite.

    `wide` (n,) uint32 and `half` (n,) uint16 are scratch.

    The same as `_bfloat16_to_float16` after rounding away 13 bits of the fraction; numpy casts what lies outside.
    """
    np.right_shift(bits, 13, out=wide)
    np.bitwise_and(wide, 1, out=wide)
    np.add(wide, 0xFFF, out=wide)
    np.add(wide, bits, out=wide)
    np.right_shift(wide, 13, out=wide)
    np.copyto(out, wide, casting="unsafe")
    np.add(out, 0x4000, out=out)
    np.bitwise_and(out, 0x7FFF, out=out)
    np.right_shift(bits, 16, out=wide)
    np.copyto(half, wide, casting="unsafe")
    np.bitwise_or(out, half & 0x8000, out=out)
    np.add(half, half, out=half)
    np.subtract(half, 2 * 0x3880, out=half)
    outside = np.flatnonzero(half >= 2 * (0x477F - 0x3880))  # 0x477F: the upper half of what may round up to 65536
    if not outside.size:
        return 0
    repaired = bits[outside]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out[outside] = repaired.view(np.float32).astype(np.float16).view(np.uint16)
    return _count_lost(repaired & 0x7FFFFFFF, _FLOAT32)


def _count_lost(magnitudes: Array, dtype: np.dtype[Any]) -> int:
    finite = magnitudes < _NONFINITE_FROM[dtype]
    return int(np.count_nonzero(finite & (magnitudes >= _FLOAT16_OVERFLOW_FROM[dtype])))


def _top_magnitude(bits: Array) -> int:
    """Largest value of `bits` (n,) unsigned, n > 0, with the sign bit cleared; two reductions and no copy."""
    width = bits.dtype.itemsize
    positive = int(np.maximum.reduce(bits.view(f"i{width}")))
    negative = int(np.maximum.reduce(bits)) & ((1 << (8 * width - 1)) - 1)
    return max(positive, negative)


def _count_from(bits: Array, low: int) -> int:
    """Count values whose image without the sign is `low` or more; the usual answer 0 costs two reductions."""
    mask = bits.dtype.type((1 << (8 * bits.dtype.itemsize - 1)) - 1)
    wild = (chunk for _, chunk in _chunks(bits) if _top_magnitude(chunk) >= low)
    return sum(int(np.count_nonzero((chunk & mask) >= low)) for chunk in wild)
