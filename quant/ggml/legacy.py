"""Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: one scale per 32 weights, with or without a minimum.

Formulas (quantize_row_*_ref in llama.cpp's ggml-quants.c; all arithmetic in float32, scales rounded to float16 last):

    Q8_0          scale = peak / 127                 code = round half away from zero(x / scale)
    Q4_0, Q5_0    scale = signed peak / -(2^(b-1))   code = min(2^b - 1, trunc(x / scale + 2^(b-1) + 0.5))
    Q4_1, Q5_1    scale = (max - min) / (2^b - 1)    code = trunc((x - min) / scale + 0.5)

x / scale is x * (1 / scale). Where that inverse overflows (a scale below 2^-128, which float16 stores as zero anyway) C
leaves the codes undefined; the libraries in use write 0, and so does this. Of equal peaks the first counts, and so does
the sign of the first zero where the minimum is zero. Bytes equal those of a libggml built without fused multiply-add,
which is how it is shipped for x86-64.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml import layouts
from quantpress.quant.ggml.workspace import Workspace

__all__ = [
    "decode_q4_0",
    "decode_q4_1",
    "decode_q5_0",
    "decode_q5_1",
    "decode_q8_0",
    "encode_q4_0",
    "encode_q4_1",
    "encode_q5_0",
    "encode_q5_1",
    "encode_q8_0",
]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

_ONES = np.uint64(0x0101010101010101)
_LOW_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)


def encode_q8_0(values: Floats, out: Bytes, work: Workspace) -> int:
    """Quantize a chunk; the shared contract of all encoders in this file.

    Args:
        values: (B, 32) float32, finite, contiguous; not changed.
        out: (B, 34) uint8, contiguous; written.
        work: buffers for exactly B blocks.

    Returns:
        Number of blocks with a scale or minimum that float16 cannot hold; their bytes are useless.
    """
    scale = work.peak(values) / np.float32(127)
    inverse, _ = _invert(scale)
    np.multiply(values, inverse[:, None], out=work.steps)
    # rint rounds halves to even, ggml away from zero. A half has a zero as its last bit; with that bit set it lies just
    # beyond the half, and no other value can reach or pass one.
    bits = work.steps.view(np.uint32)
    np.bitwise_or(bits, 1, out=bits)
    np.rint(work.steps, out=work.steps)
    np.copyto(work.codes.view(np.int8), work.steps, casting="unsafe")
    block = out.reshape(-1).view(layouts.Q8_0)
    block["codes"] = work.codes.reshape(-1).view("V32")
    return _count(_store_half(block["scale"], scale))


def encode_q4_0(values: Floats, out: Bytes, work: Workspace) -> int:
    """Quantize (B, 32) float32 to (B, 18) uint8; see `encode_q8_0`."""
    block = out.reshape(-1).view(layouts.Q4_0)
    scale = _symmetric_codes(values, work, bits=4)
    work.pack_nibbles(block["codes"])
    return _count(_store_half(block["scale"], scale))


def encode_q5_0(values: Floats, out: Bytes, work: Workspace) -> int:
    """Quantize (B, 32) float32 to (B, 22) uint8; see `encode_q8_0`."""
    block = out.reshape(-1).view(layouts.Q5_0)
    scale = _symmetric_codes(values, work, bits=5)
    _pack_five_bits(block, work)
    return _count(_store_half(block["scale"], scale))


def encode_q4_1(values: Floats, out: Bytes, work: Workspace) -> int:
    """Quantize (B, 32) float32 to (B, 20) uint8; see `encode_q8_0`."""
    block = out.reshape(-1).view(layouts.Q4_1)
    scale, minimum = _affine_codes(values, work, bits=4)
    work.pack_nibbles(block["codes"])
    return _count(_store_half(block["scale"], scale) | _store_half(block["minimum"], minimum))


def encode_q5_1(values: Floats, out: Bytes, work: Workspace) -> int:
    """Quantize (B, 32) float32 to (B, 24) uint8; see `encode_q8_0`."""
    block = out.reshape(-1).view(layouts.Q5_1)
    scale, minimum = _affine_codes(values, work, bits=5)
    _pack_five_bits(block, work)
    return _count(_store_half(block["scale"], scale) | _store_half(block["minimum"], minimum))


def _symmetric_codes(values: Floats, work: Workspace, *, bits: int) -> Floats:
    """Fill `work.codes` for Q4_0 or Q5_0 and return the scales (B,)."""
    half = 1 << (bits - 1)
    scale = work.signed_peak(values) / np.float32(-half)
    inverse, tiny = _invert(scale)
    np.multiply(values, inverse[:, None], out=work.steps)
    np.add(work.steps, np.float32(half + 0.5), out=work.steps)
    np.copyto(work.codes, work.steps, casting="unsafe")
    # A weight opposite to the peak and as large gives 2^bits; take its carry off again (eight codes per word).
    carry = work.packed
    np.right_shift(work.words, np.uint64(bits), out=carry)
    np.bitwise_and(carry, _ONES, out=carry)
    np.subtract(work.words, carry, out=work.words)
    work.codes[tiny] = 0
    return scale


def _affine_codes(values: Floats, work: Workspace, *, bits: int) -> tuple[Floats, Floats]:
    """Fill `work.codes` for Q4_1 or Q5_1 and return the scales and the minima, (B,) each."""
    minimum = work.minimum(values)
    spread = work.reduce(np.maximum, values) - minimum + np.float32(0)  # -0 minus +0 is -0, and -0 + 0 is +0
    scale = spread / np.float32((1 << bits) - 1)
    inverse, _ = _invert(scale)  # tiny scales: 0 * 0 + 0.5 is code 0 without more ado
    np.subtract(values, minimum[:, None], out=work.steps)
    np.multiply(work.steps, inverse[:, None], out=work.steps)
    np.add(work.steps, np.float32(0.5), out=work.steps)
    np.copyto(work.codes, work.steps, casting="unsafe")
    return scale, minimum


def _invert(scale: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Return 1 / scale, with 0 where that is infinite, and the blocks whose scale is not zero but too small for it."""
    inverse = np.reciprocal(scale)
    infinite = np.flatnonzero(np.isinf(inverse))
    inverse[infinite] = 0
    return inverse, infinite[scale[infinite] != 0]


def _pack_five_bits(block: Any, work: Workspace) -> None:
    """Split codes of five bits into the mask of fifth bits and nibbles; `work.words` keeps only the nibbles."""
    np.right_shift(work.words, np.uint64(4), out=work.packed)
    np.bitwise_and(work.packed, _ONES, out=work.packed)
    block["high"] = np.packbits(work.packed.view(np.uint8), bitorder="little").view("<u4")
    np.bitwise_and(work.words, _LOW_NIBBLES, out=work.words)
    work.pack_nibbles(block["codes"])


def _store_half(field: Any, values: Floats) -> NDArray[np.bool_]:
    """Write `values` (B,) as float16 and mark those that became infinite or NaN."""
    half = values.astype(np.float16)
    field[...] = half
    return np.asarray((half.view(np.uint16) & 0x7C00) == 0x7C00)


def _count(marks: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(marks))


def decode_q8_0(data: Bytes, out: Floats) -> None:
    """Dequantize a chunk, weight = scale * code; the shared contract of all decoders.

    Args:
        data: (B, 34) uint8, contiguous.
        out: (B, 32) float32, contiguous; written.
    """
    np.copyto(out, data[:, 2:].view(np.int8))
    np.multiply(out, _float32(data, 0), out=out)


def decode_q4_0(data: Bytes, out: Floats) -> None:
    """Dequantize (B, 18) uint8 to (B, 32) float32: scale * (code - 8)."""
    _unpack_nibbles(data[:, 2:], out)
    np.subtract(out, np.float32(8), out=out)
    np.multiply(out, _float32(data, 0), out=out)


def decode_q4_1(data: Bytes, out: Floats) -> None:
    """Dequantize (B, 20) uint8 to (B, 32) float32: scale * code + minimum."""
    _unpack_nibbles(data[:, 4:], out)
    np.multiply(out, _float32(data, 0), out=out)
    np.add(out, _float32(data, 2), out=out)


def decode_q5_0(data: Bytes, out: Floats) -> None:
    """Dequantize (B, 22) uint8 to (B, 32) float32: scale * (code - 16)."""
    _unpack_nibbles(data[:, 6:], out)
    np.add(out, _fifth_bits(data[:, 2:6]), out=out)
    np.subtract(out, np.float32(16), out=out)
    np.multiply(out, _float32(data, 0), out=out)


def decode_q5_1(data: Bytes, out: Floats) -> None:
    """Dequantize (B, 24) uint8 to (B, 32) float32: scale * code + minimum."""
    _unpack_nibbles(data[:, 8:], out)
    np.add(out, _fifth_bits(data[:, 4:8]), out=out)
    np.multiply(out, _float32(data, 0), out=out)
    np.add(out, _float32(data, 2), out=out)


def _float32(data: Bytes, offset: int) -> Floats:
    """The float16 at byte `offset` of each block, (B, 1) float32."""
    return np.ascontiguousarray(data[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _unpack_nibbles(codes: Bytes, out: Floats) -> None:
    """Codes (B, 16) uint8 to (B, 32) float32 in [0, 16)."""
    np.copyto(out[:, :16], codes & 0x0F)
    np.copyto(out[:, 16:], codes >> 4)


def _fifth_bits(mask: Bytes) -> Bytes:
    """Masks (B, 4) uint8 to (B, 32) uint8, 16 where the bit is set."""
    return np.left_shift(np.unpackbits(mask, axis=1, bitorder="little"), np.uint8(4))
