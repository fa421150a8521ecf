"""Double quantization of QLoRA: the absmax values of 4-bit blocks, stored in 8 bits as bitsandbytes does.

The mean of a tensor's absmax values is subtracted, the rest is cut into blocks of 256, scaled by each block's largest
magnitude and rounded to one of 256 levels, the dynamic map: a sign, an exponent in tens and a fraction whose length
depends on it (Dettmers, arXiv 1511.04561; QLoRA, arXiv 2305.14314, section 3).

Sources: bitsandbytes functional.py (create_dynamic_map, quantize_4bit, dequantize_blockwise), csrc dQuantize; PyTorch
ReduceMomentKernel.cu for the mean. CUDA is followed: ties of its binary search, and the mean as the sum times the
float32 reciprocal of the count. The order in which CUDA adds is not known; here the sum is exact and rounded once, so
the mean may differ from a training's by a few units in the last place. A stored checkpoint holds the mean itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.bitsandbytes import block_absmax, block_count

__all__ = ["NESTED_BLOCKSIZE", "NestedAbsmax", "dynamic_map", "mean_absmax", "quantize_absmax"]

Float32Array: TypeAlias = NDArray[np.float32]

NESTED_BLOCKSIZE = 256  # absmax values per block of the second quantization (quantize_4bit, compress_statistics)
_EXPONENTS = 7  # powers of ten from 1e-6 to 1
_LEVELS = 256


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """The absmax values of a tensor in 8 bits.

    Attributes:
        codes: (blocks,) uint8.
        absmax: (ceil(blocks / blocksize),) float32.
        offset: what was subtracted before, float32.
        levels: (256,) float32: the level of each code.
        blocksize: codes per value of `absmax`.
    """

    codes: NDArray[np.uint8]
    absmax: Float32Array
    offset: np.float32
    levels: Float32Array
    blocksize: int = NESTED_BLOCKSIZE

    def values(self, start: int = 0, stop: int | None = None) -> Float32Array:
        """Gives the absmax of blocks [start, stop), float32: `levels[code] * absmax`, rounded, then `+ offset`."""
        stop = self.codes.size if stop is None else stop
        out = self.levels[self.codes[start:stop]]
        out *= self.absmax[np.arange(start, stop) // self.blocksize]
        out += self.offset
        return out


@cache
def dynamic_map() -> Float32Array:
    """Gives the (256,) float32 levels in ascending order, from -0.993 to 1, with an exact zero."""
    positive: list[float] = []
    for exponent in range(_EXPONENTS):
        edges = _linspace(2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive += (np.float32(10.0 ** (exponent + 1 - _EXPONENTS)) * middles).tolist()
    levels = np.array(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), np.float32)
    levels.flags.writeable = False
    return levels


def mean_absmax(total: float, blocks: int) -> np.float32:
    """Gives the mean of `blocks` absmax values from their exact sum, in CUDA's arithmetic."""
    return np.float32(np.float32(total) * (np.float32(1) / np.float32(blocks)))


def quantize_absmax(absmax: Float32Array, offset: np.float32 | None = None) -> NestedAbsmax:
    """Quantizes the absmax values of all blocks of a tensor.

    Args:
        absmax: (blocks,) float32.
        offset: their mean, if it is known better than it can be computed from them.

    Returns:
        What a checkpoint would store.
    """
    if offset is None:
        offset = mean_absmax(float(np.sum(absmax, dtype=np.float64)), absmax.size)
    centred = absmax - offset
    outer = block_absmax(centred, NESTED_BLOCKSIZE)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factors = (np.float32(1) / outer)[np.arange(absmax.size) // NESTED_BLOCKSIZE]
        scaled = centred * factors
    codes = np.searchsorted(_limits(), scaled, side="left").astype(np.uint8)
    # Zero times infinity is above no level and below no midpoint: the search ends on its lowest pivot.
    codes[np.isnan(scaled)] = 0
    assert codes.size == absmax.size
    assert outer.size == block_count(absmax.size, NESTED_BLOCKSIZE)
    return NestedAbsmax(codes, outer, offset, dynamic_map())


@cache
def _limits() -> Float32Array:
    """(255,) float32: a value above the first `n` limits and no more has code `n`.

    A limit is the midpoint of two levels. CUDA's search gives the midpoint itself to the lower level if it ends there
    and to the upper one if it ends there, so every midpoint is sent through it once.
    """
    levels = dynamic_map()
    limits = (levels[:-1] + levels[1:]) * np.float32(0.5)
    for code, midpoint in enumerate(limits):
        if _search(float(midpoint)) > code:
            limits[code] = np.nextafter(midpoint, np.float32(-2))
    limits.flags.writeable = False
    return limits


def _search(value: float) -> int:
    """The code that CUDA's dQuantize gives to a value: a binary search of 7 steps, then the nearer neighbour."""
    levels = dynamic_map()
    pivot, lower, upper = 127, 0, _LEVELS - 1
    for step in (64, 32, 16, 8, 4, 2, 1):
        if value > levels[pivot]:
            lower, pivot = pivot, pivot + step
        else:
            upper, pivot = pivot, pivot - step
    if value > levels[pivot]:
        return upper if value > (levels[upper] + levels[pivot]) * np.float32(0.5) else pivot
    return lower if value < (levels[lower] + levels[pivot]) * np.float32(0.5) else pivot


def _linspace(count: int) -> Float32Array:
    """`count` values from 0.1 to 1 in float32, as torch.linspace gives them on a processor with fused multiply-add.

    Each half is counted from its own end, and product and sum are rounded together: float64 holds both exactly enough.
    """
    first, last = np.float64(np.float32(0.1)), np.float64(1)
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count - 1))
    index = np.arange(count)
    values = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    return values.astype(np.float32)
