"""4-bit weights in the arithmetic of bitsandbytes: what a QLoRA training computed with.

A tensor is flattened row by row and cut into blocks of `blocksize` values (the last may be shorter). A block keeps its
largest magnitude, `absmax`, in float32; a value becomes the code of the level nearest to value / absmax, and comes back
as `level[code] * absmax`, computed in float32 and rounded once to the type of the weight. Two codes share a byte, the
first in the high half.

Sources: bitsandbytes functional.py (get_4bit_type, quantize_4bit), csrc kQuantizeBlockwise, dQuantizeNF4, dQuantizeFP4,
kDequantizeBlockwise. Where its kernels differ, CUDA's are followed, because training ran there:

* FP4: CUDA compares magnitudes with limits of 6 to 8 digits, the CPU with the exact midpoints, and gives a negative tie
  to the larger magnitude. NF4 has the same limits and ties in both.
* A block of zeros is divided by zero: on CUDA every NaN becomes code 0, which is -1 in NF4; the CPU gives the code of
  zero. It shows only when absmax is quantized too and no longer exactly zero.
* The last, shorter block: the CPU divides by absmax, CUDA multiplies with 1 / absmax as in every block.

One thing cannot be followed: CUDA's 1 / absmax is an approximation that may be one unit in the last place off, here it
is rounded correctly. It matters only to a value within 2^-22 of a limit. No quotient of two bfloat16 numbers comes so
near to one of NF4's limits; FP4's limits are quotients themselves (5 / 12), and about one value in 2000 lies on one.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.bitsandbytes_levels import LEVELS, codes_of, levels_of, packed_pairs
from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.floats import BFLOAT16, count_nonfinite, to_bfloat16, to_float16, to_float32

__all__ = [
    "BLOCKSIZES",
    "block_absmax",
    "block_count",
    "check_4bit",
    "dequantize_4bit",
    "pack",
    "quantize_4bit",
    "round_to",
    "round_trip_4bit",
]

Array: TypeAlias = NDArray[Any]
Float32Array: TypeAlias = NDArray[np.float32]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_CHUNK = 1 << 16  # values worked on at a time: with all that is beside them they stay in the second-level cache
_SMALLEST_NORMAL = np.float32(2.0**-126)  # CUDA's fast arithmetic takes what is smaller for zero
_NAN = np.float32(np.nan)


def check_4bit(quant_type: str, blocksize: int) -> None:
    """Checks the two settings of a 4-bit quantization.

    Raises:
        UsageError: bitsandbytes has no such type or block.
    """
    if quant_type not in LEVELS:
        raise UsageError(f"4-bit type {quant_type!r} is unknown; known are {', '.join(LEVELS)}")
    if blocksize not in BLOCKSIZES:
        raise UsageError(f"blocksize {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")


def block_count(size: int, blocksize: int) -> int:
    """Gives how many blocks `size` values have, a shorter last one included."""
    return -(-size // blocksize)


def block_absmax(values: Array, blocksize: int) -> Float32Array:
    """Gives the largest magnitude of each block.

    Args:
        values: (n,) float32, float16 or bfloat16, beginning at the start of a block.
        blocksize: values per block.

    Returns:
        (ceil(n / blocksize),) float32.

    Raises:
        InputError: NaN or infinite values.
    """
    kind = values.dtype
    width = kind.itemsize
    # Without its sign, an IEEE number is ordered as the integer it is stored as, and integers are faster to compare.
    images = values.view(f"u{width}")
    unsigned = images.dtype.type((1 << (8 * width - 1)) - 1)
    full = values.size // blocksize * blocksize
    out = np.empty(block_count(values.size, blocksize), images.dtype)
    step = max(1, _CHUNK // blocksize) * blocksize
    for start in range(0, full, step):
        chunk = images[start : min(start + step, full)] & unsigned
        np.max(chunk.reshape(-1, blocksize), axis=1, out=out[start // blocksize :][: chunk.size // blocksize])
    if full < values.size:
        out[-1] = np.max(images[full:] & unsigned)
    absmax = to_float32(out.view(kind))
    if not np.isfinite(absmax).all():
        raise InputError(f"{count_nonfinite(values)} values are NaN or infinite")
    return absmax


def quantize_4bit(values: Array, absmax: Float32Array, *, quant_type: str, blocksize: int) -> NDArray[np.uint8]:
    """Gives the code of each value.

    Args:
        values: (n,) float32, float16 or bfloat16, beginning at the start of a block.
        absmax: (ceil(n / blocksize),) float32, of `block_absmax`.
        quant_type: "nf4" or "fp4".
        blocksize: values per block.

    Returns:
        (n,) uint8 in [0, 16).
    """
    codes = np.empty(values.size, np.uint8)
    reciprocal = _reciprocal(absmax)
    for start, stop in _chunks(values.size, blocksize):
        scaled = _scaled(to_float32(values[start:stop]), reciprocal[start // blocksize :], blocksize)
        codes[start:stop] = codes_of(scaled, quant_type)
    return codes


def dequantize_4bit(
    packed: NDArray[np.uint8],
    absmax: Float32Array,
    *,
    quant_type: str,
    blocksize: int,
    dtype: np.dtype[Any],
    first: int,
    count: int,
) -> Array:
    """Gives values of packed codes.

    Args:
        packed: uint8, from the byte on that holds value `first`.
        absmax: float32, of the blocks from the one on that holds value `first`.
        quant_type: "nf4" or "fp4".
        blocksize: values per block.
        dtype: float32, float16 or bfloat16: what the products are rounded to.
        first: number of the first wanted value in the whole tensor.
        count: how many values are wanted.

    Returns:
        (count,) of that type.
    """
    pairs = packed_pairs(quant_type)
    out = np.empty(count, dtype)
    skip, lead = first % blocksize, first % 2
    for start in range(0, count, _CHUNK):  # an even number: every chunk begins in the same half of a byte
        stop = min(start + _CHUNK, count)
        both = np.take(pairs, packed[start // 2 : (lead + stop + 1) // 2], mode="clip").view(np.float32)
        values = both[lead : lead + stop - start]
        out[start:stop] = round_to(_times_blocks(values, absmax, blocksize, skip + start), dtype)
    return out


def round_trip_4bit(
    values: Array,
    *,
    quant_type: str,
    blocksize: int,
    stored_absmax: Float32Array | None = None,
    dtype: np.dtype[Any] | None = None,
) -> Array:
    """Quantizes and dequantizes in one pass.

    Args:
        values: (n,) float32, float16 or bfloat16, beginning at the start of a block.
        quant_type: "nf4" or "fp4".
        blocksize: values per block.
        stored_absmax: (ceil(n / blocksize),) float32: what the blocks' absmax is after it was quantized itself. The
            codes are chosen by the true one.
        dtype: type of the result; that of `values` by default.

    Returns:
        (n,) of that type.

    Raises:
        InputError: NaN or infinite values.
    """
    dtype = dtype or values.dtype
    absmax = block_absmax(values, blocksize)
    stored = absmax if stored_absmax is None else stored_absmax
    reciprocal = _reciprocal(absmax)
    out = np.empty(values.size, dtype)
    for start, stop in _chunks(values.size, blocksize):
        block = start // blocksize
        scaled = _scaled(to_float32(values[start:stop]), reciprocal[block:], blocksize)
        back = levels_of(codes_of(scaled, quant_type), quant_type)
        out[start:stop] = round_to(_times_blocks(back, stored[block:], blocksize), dtype)
    return out


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Puts two codes into a byte, the first into its high half; an odd last byte has 0 in the low half."""
    packed = np.zeros((codes.size + 1) // 2, np.uint8)
    packed |= codes[0::2] << 4
    packed[: codes.size // 2] |= codes[1::2]
    return packed


def round_to(values: Float32Array, dtype: np.dtype[Any]) -> Array:
    """Rounds float32 to float32, float16 or bfloat16: to nearest, ties to even."""
    if dtype == BFLOAT16:
        return to_bfloat16(values)
    return to_float16(values) if dtype == np.float16 else values


def _chunks(size: int, blocksize: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // blocksize) * blocksize
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _reciprocal(absmax: Float32Array) -> Float32Array:
    """1 / absmax; NaN where absmax is zero, so that every value of the block becomes NaN as on CUDA."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(absmax < _SMALLEST_NORMAL, _NAN, np.float32(1) / absmax)


def _scaled(values: Float32Array, factors: Float32Array, blocksize: int) -> Float32Array:
    return _times_blocks(values, factors, blocksize, in_place=False)


def _times_blocks(
    values: Float32Array, factors: Float32Array, blocksize: int, skip: int = 0, *, in_place: bool = True
) -> Float32Array:
    """Multiplies each value with its block's factor; the first value is number `skip` counted from the first factor."""
    out = values if in_place else np.empty_like(values)
    first = skip // blocksize
    lead = min(-skip % blocksize, values.size)
    if lead:
        np.multiply(values[:lead], factors[first], out=out[:lead])
        first += 1
    stop = lead + (values.size - lead) // blocksize * blocksize
    full = (stop - lead) // blocksize
    shape = (full, blocksize)
    np.multiply(
        values[lead:stop].reshape(shape), factors[first : first + full, None], out=out[lead:stop].reshape(shape)
    )
    if stop < values.size:
        np.multiply(values[stop:], factors[first + full], out=out[stop:])
    return out
