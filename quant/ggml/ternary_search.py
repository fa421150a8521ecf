"""TQ1_0 and TQ2_0: -scale, 0 or +scale, where the scale is the greatest magnitude of 256 weights.

Source: quantize_row_tq1_0_ref and quantize_row_tq2_0_ref in llama.cpp's ggml-quants.c; the bytes are libggml's. They
are meant for weights that are ternary already (BitNet b1.58, TriLM), so nothing is searched and importance is not
looked at.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.compiled import compiled
from quantpress.quant.ggml.tiles import put_halves, writable

__all__ = ["search_tq1_0", "search_tq2_0"]

Array = NDArray[Any]

_SIZE: Final = 256
_HALF = np.float32(0.5)
_ZERO = np.float32(0)
_ONE = np.float32(1)


def search_tq1_0(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to TQ1_0: 52 bytes of five or four ternary digits, then the float16 scale; see `search.Search`."""
    del importance, first  # a block is encoded by itself
    scales = np.empty(len(values), np.float32)
    _encode_tq1_0(writable(values), scales, out)
    return int(np.count_nonzero(put_halves(scales, out[:, 52:])))


def search_tq2_0(values: Array, importance: Array | None, first: int, out: Array) -> int:
    """Quantizes to TQ2_0: 64 bytes of four 2-bit codes, then the float16 scale; see `search.Search`."""
    del importance, first  # a block is encoded by itself
    scales = np.empty(len(values), np.float32)
    _encode_tq2_0(writable(values), scales, out)
    return int(np.count_nonzero(put_halves(scales, out[:, 64:])))


@compiled()
def _round_to_trits(block: Array, trits: Array) -> np.float32:
    """Fills `trits` (256,) uint8 with 0, 1, 2 for -scale, 0, +scale, and gives the scale.

    Halves go away from 0. A scale whose inverse is infinite is 0 as float16, and all its digits are 1, as where
    libggml rounds what is not finite.
    """
    # The greatest magnitude has the greatest bits: that has no order of operations, so it is done in vectors.
    greatest = np.uint32(0)
    bits = block.view(np.uint32)
    for column in range(_SIZE):
        greatest = max(greatest, bits[column] & np.uint32(0x7FFFFFFF))
    scale = np.uint32(greatest).view(np.float32)
    inverse = np.divide(_ONE, scale)
    if not np.isfinite(inverse):
        inverse = _ZERO
    for column in range(_SIZE):
        place = block[column] * inverse
        trits[column] = np.uint8(1) + np.uint8(place >= _HALF) - np.uint8(place <= -_HALF)
    return scale


@compiled()
def _pack_trits(trits: Array, digits: int, target: Array) -> None:
    """Makes each byte of `target` (run,) the fraction of 256 whose first ternary digits are `trits` (digits * run,)."""
    run = target.size
    for byte in range(run):
        number = 0
        for digit in range(5):
            number = number * 3 + (int(trits[digit * run + byte]) if digit < digits else 0)
        target[byte] = np.uint8((number * 256 + 242) // 243)  # rounded up: reading it multiplies and rounds down


@compiled()
def _encode_tq1_0(values: Array, scales: Array, out: Array) -> None:
    trits = np.empty(_SIZE, np.uint8)
    for block in range(values.shape[0]):
        scales[block] = _round_to_trits(values[block], trits)
        _pack_trits(trits[:160], 5, out[block, :32])
        _pack_trits(trits[160:240], 5, out[block, 32:48])
        _pack_trits(trits[240:], 4, out[block, 48:52])


@compiled()
def _encode_tq2_0(values: Array, scales: Array, out: Array) -> None:
    trits = np.empty(_SIZE, np.uint8)
    for block in range(values.shape[0]):
        scales[block] = _round_to_trits(values[block], trits)
        for half in range(2):
            part, target = trits[128 * half : 128 * half + 128], out[block, 32 * half : 32 * half + 32]
            for byte in range(32):
                target[byte] = part[byte] | part[byte + 32] << 2 | part[byte + 64] << 4 | part[byte + 96] << 6
