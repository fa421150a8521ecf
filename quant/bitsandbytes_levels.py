"""The sixteen levels of NF4 and FP4, the limits between them, and how values and codes are looked up in bulk.

Sources: bitsandbytes functional.py (get_4bit_type), csrc dQuantizeNF4 and dQuantizeFP4.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "codes_of", "levels_of", "packed_pairs"]

Float32Array: TypeAlias = NDArray[np.float32]

# Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# One bit of sign, then three bits whose magnitudes are these twelfths; code 8 is minus zero.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _fixed(values: Any, dtype: Any = np.float32) -> NDArray[Any]:
    array = np.array(values, dtype)
    array.flags.writeable = False
    return array


_FP4 = np.array(_FP4_TWELFTHS, np.float32) / np.float32(12)
LEVELS = MappingProxyType({"nf4": _fixed(_NF4), "fp4": _fixed([*_FP4, *-_FP4])})
"""Quantization type -> (16,) float32: the level of each code."""

# A scaled value above the first `n` of these limits has NF4 code `n`: the float32 midpoints of neighbouring levels.
_NF4_LIMITS = _fixed((LEVELS["nf4"][:-1] + LEVELS["nf4"][1:]) * np.float32(0.5))
# The same for the magnitudes of FP4, in the digits of dQuantizeFP4, and the codes in order of magnitude.
_FP4_LIMITS = _fixed([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
_FP4_ORDER = _fixed([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)


def levels_of(codes: NDArray[np.uint8], quant_type: str) -> Float32Array:
    """Looks up (n,) codes two at a time, which takes half as long as one at a time."""
    even = codes.size // 2 * 2
    values = np.empty(codes.size, np.float32)
    np.take(_code_pairs(quant_type), codes[:even].view(np.uint16), out=values[:even].view(np.uint64), mode="clip")
    values[even:] = LEVELS[quant_type][codes[even:]]
    return values


@cache
def _code_pairs(quant_type: str) -> NDArray[np.uint64]:
    """The levels of two codes that lie in two bytes, by those bytes read as one number."""
    codes = np.arange(16 << 8, dtype=np.uint16).view(np.uint8) & 15
    pairs: NDArray[np.uint64] = LEVELS[quant_type][codes].view(np.uint64)
    return pairs


@cache
def packed_pairs(quant_type: str) -> NDArray[np.uint64]:
    """The levels of the two codes in a byte, the high half first."""
    byte = np.arange(256)
    return LEVELS[quant_type][np.stack([byte >> 4, byte & 15], axis=1)].reshape(-1).view(np.uint64)


def codes_of(scaled: Float32Array, quant_type: str) -> NDArray[np.uint8]:
    """Codes of values in [-1, 1]; NaN, which is above no limit, gets code 0."""
    if quant_type == "nf4":
        return _count_above(scaled, _NF4_LIMITS)
    negative = (scaled < 0).view(np.uint8)
    codes: NDArray[np.uint8] = _FP4_ORDER[_count_above(np.abs(scaled), _FP4_LIMITS)]
    codes |= negative << 3
    return codes


def _count_above(scaled: Float32Array, limits: Float32Array) -> NDArray[np.uint8]:
    """How many limits each value is above: one vectorised pass a limit, faster than a binary search per value."""
    codes = np.zeros(scaled.size, np.uint8)
    above = np.empty(scaled.size, np.bool_)
    for limit in limits:
        np.greater(scaled, limit, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    return codes
