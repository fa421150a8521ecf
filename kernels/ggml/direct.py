"""TQ1_0, TQ2_0 and MXFP4, whose scales follow from the greatest weight: quantize_row_tq1_0_ref and its neighbours.

`work` is (blocks,) float32: what a code is found with, the inverse of the greatest weight or half of the scale.
Source: llama.cpp's ggml-quants.c; layouts: block_tq1_0, block_tq2_0 and block_mxfp4 in ggml-common.h.
"""

# Triton functions have no types, and starred elements are not compiled.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from quantpress.kernels.kquants.search import store_half

__all__ = ["fit_greatest", "pack_fp4", "pack_ternary"]

_FP4 = tl.constexpr((0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0))


@triton.jit
def fit_greatest(
    values, work, blocks, total, size: tl.constexpr, block_bytes: tl.constexpr, step: tl.constexpr, block: tl.constexpr
):
    """Finds the greatest weight of each block of `size` and stores the scale: float16 at `step`, exponent if None."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = lane < total
    place = lane[:, None] * size + tl.arange(0, size)[None, :]
    value = tl.load(values + place, mask=inside[:, None], other=0.0).to(tl.float32)
    greatest = tl.max(tl.abs(value), axis=1)
    if step is None:
        exponent = tl.where(greatest > 0.0, _floor_of_log2(greatest) + 125, 0) & 255
        tl.store(blocks + lane * block_bytes, exponent.to(tl.uint8), mask=inside)
        # 2^(exponent - 128): the two least ones are subnormal
        bits = tl.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
        factor = bits.to(tl.float32, bitcast=True)
    else:
        store_half(blocks + lane * block_bytes + step, greatest, inside)
        one = tl.full((block,), 1.0, tl.float32)
        factor = tl.where(greatest == 0.0, 0.0, tl.div_rn(one, tl.where(greatest == 0.0, one, greatest)))
    tl.store(work + lane, factor, mask=inside)


@triton.jit
def _floor_of_log2(values):
    """floor(log2f(x)): as log2f rounds, numbers just below a power of two count as that power.

    For a result n the step of float32 is 2^(p - 23), where p is the whole part of log2 |n|, one less if n is itself a
    positive power of two. What lies m * 2^-24 * 2^n below 2^n has a logarithm m * 1.4427 * 2^-24 below n, which rounds
    to n up to half a step: up to m = floor(2^p ln 2).
    """
    tiny = values < 1.17549435e-38
    bits = tl.where(tiny, values * 16777216.0, values).to(tl.int32, bitcast=True)
    above = (bits >> 23) - 126 - tl.where(tiny, 24, 0)
    size = tl.where(above > 0, above - 1, -above)  # p is the whole part of log2 of it
    reach = tl.where(size >= 128, 88, tl.where(size >= 64, 44, tl.where(size >= 32, 22, tl.where(size >= 16, 11, 0))))
    reach += tl.where((size >= 8) & (size < 16), 5, tl.where((size >= 4) & (size < 8), 2, 0))
    reach += tl.where((size >= 2) & (size < 4), 1, 0)
    return tl.where(0x00800000 - (bits & 0x007FFFFF) <= reach, above, above - 1)


@triton.jit
def pack_ternary(values, work, blocks, total, five: tl.constexpr, block: tl.constexpr):
    """Fills in the codes, one lane for each byte: five digits of base 3 (TQ1_0), or four codes of two bits (TQ2_0)."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    count: tl.constexpr = 52 if five else 64
    index = lane // count
    byte = lane % count
    inside = index < total
    factor = tl.load(work + index, mask=inside, other=0.0)
    start = values + index * 256
    found = tl.zeros((block,), tl.int32)
    if five:
        # runs of 32 and 16 bytes with 5 digits, and of 4 bytes with 4 and a zero
        run = tl.where(byte < 32, 32, tl.where(byte < 48, 16, 4))
        first = tl.where(byte < 32, byte, tl.where(byte < 48, byte + 128, byte + 192))
        for digit in tl.static_range(5):
            used = inside & ((byte < 48) | (digit < 4))
            code = _trit(tl.load(start + first + digit * run, mask=used, other=0.0).to(tl.float32), factor)
            found = 3 * found + tl.where(used, code, 0)
        found = (256 * found + 242) // 243
        target = index * 54 + byte
    else:
        first = byte // 32 * 128 + byte % 32
        for plane in tl.static_range(4):
            code = _trit(tl.load(start + first + 32 * plane, mask=inside, other=0.0).to(tl.float32), factor)
            found |= code << (2 * plane)
        target = index * 66 + byte
    tl.store(blocks + target, found.to(tl.uint8), mask=inside)


@triton.jit
def _trit(value, factor):
    """lroundf(factor * value) + 1; where the factor is infinite lroundf gives a number whose low half is 0."""
    share = tl.where(factor == float("inf"), 0.0, value * factor)
    return tl.where(share >= 0.5, 2, tl.where(share <= -0.5, 0, 1))


@triton.jit
def pack_fp4(values, work, blocks, total, block: tl.constexpr):
    """MXFP4: fills in the codes, one lane for each byte: two weights that lie 16 apart."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    index = lane // 16
    place = lane % 16
    inside = index < total
    half = tl.load(work + index, mask=inside, other=0.0)
    start = values + index * 32 + place
    low = _nearest_fp4(tl.load(start, mask=inside, other=0.0).to(tl.float32), half)
    high = _nearest_fp4(tl.load(start + 16, mask=inside, other=0.0).to(tl.float32), half)
    tl.store(blocks + index * 17 + 1 + place, (low | (high << 4)).to(tl.uint8), mask=inside)


@triton.jit
def _nearest_fp4(value, half):
    """The first of the 16 values of E2M1 that are nearest: `_FP4` times half the scale."""
    distance = tl.abs(value)
    code = tl.full(value.shape, 0, tl.int32)
    for index in tl.static_range(1, 16):
        other = tl.abs(half * _FP4[index] - value)
        closer = other < distance
        distance = tl.where(closer, other, distance)
        code = tl.where(closer, index, code)
    return code
