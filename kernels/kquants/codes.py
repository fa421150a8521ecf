"""Codes of the weights of K-quants, on the scales that a file holds, packed into its bytes.

Every layout keeps the 256 weights of a super-block as planes of 32: a byte holds bits of one place in several planes.
So a lane is a place, of 32, of a super-block, and finds the codes of its 8 planes. Layouts: block_q*_K in llama.cpp's
ggml-common.h.
"""

# Triton functions have no types, their tuples grow, and starred elements are not compiled.
# mypy: disable-error-code="assignment,misc,no-untyped-def,untyped-decorator,var-annotated"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from quantpress.kernels.kquants.search import nearest

__all__ = ["FROM_ONE", "FROM_TWO", "FROM_WORDS", "pack_codes"]

FROM_ONE = tl.constexpr(1)  # codes of the search: round(factor * value), signed
FROM_TWO = tl.constexpr(2)  # round(factor * (value - offset))
FROM_WORDS = tl.constexpr(3)  # 4 bits in the words that `search_q3` left


@triton.jit
def pack_codes(
    values, work, blocks, total, supers, bits: tl.constexpr, size: tl.constexpr, kept: tl.constexpr,
    block_bytes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Fills in the codes of a block; all else in it is there.

    Where a scale is stored as 0 no code means anything to a reader, and libggml leaves those of its search.
    """
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    block_index = lane // 32
    inside = block_index < supers
    place = lane % 32
    code = ()
    for plane in tl.static_range(8):
        code = code + (_code(values, work, total, block_index, plane * 32 + place, inside, bits, size, kept),)
    target = blocks + block_index * block_bytes + place
    if bits == 2:
        _store_pairs(target + 16, code, inside)
    if bits == 3:
        low = ()
        high = code[0] >> 2
        for plane in tl.static_range(8):
            low = low + (code[plane] & 3,)
            high |= (code[plane] >> 2) << plane
        tl.store(target, high.to(tl.uint8), mask=inside)
        _store_pairs(target + 32, low, inside)
    if bits == 4:
        _store_nibbles(target + 16, code, inside)
    if bits == 5:
        low = ()
        high = code[0] >> 4
        for plane in tl.static_range(8):
            low = low + (code[plane] & 15,)
            high |= (code[plane] >> 4) << plane
        tl.store(target + 16, high.to(tl.uint8), mask=inside)
        _store_nibbles(target + 48, low, inside)
    if bits == 6:
        _store_sixes(target, code, inside)


@triton.jit
def _code(values, work, total, block_index, place, inside, bits: tl.constexpr, size: tl.constexpr, kept: tl.constexpr):
    """One code for each lane, from 0 on."""
    value = tl.load(values + block_index * 256 + place, mask=inside, other=0.0).to(tl.float32)
    sub = block_index * (256 // size) + place // size
    step = tl.load(work + sub, mask=inside, other=1.0)
    unused = inside & (step == 0.0)
    factor = tl.load(work + 3 * total + sub, mask=unused, other=0.0)
    if kept == FROM_TWO:
        offset = tl.load(work + total + sub, mask=inside, other=0.0)
        start = tl.load(work + 4 * total + sub, mask=unused, other=0.0)
        far = tl.where(step == 0.0, factor * (value - start), tl.div_rn(value + offset, step))
        code = tl.minimum(tl.maximum(nearest(far), 0), (1 << bits) - 1)
    else:
        half = 1 << (bits - 1)
        far = tl.where(step == 0.0, factor * value, tl.div_rn(value, step))
        code = tl.minimum(tl.maximum(nearest(far), -half), half - 1) + half
        if kept == FROM_ONE:
            code = tl.where(unused & (factor == float("inf")), 0, code)
        else:
            second = tl.load(work + 4 * total + sub, mask=unused, other=0.0)
            index = place % 16
            word = tl.where(index < 8, factor, second).to(tl.int32, bitcast=True)
            code = tl.where(unused, (word >> (4 * (index % 8))) & 7, code)
    return code


@triton.jit
def _store_pairs(target, code, inside):
    for half in tl.static_range(2):
        byte = code[4 * half]
        for plane in tl.static_range(1, 4):
            byte |= code[4 * half + plane] << (2 * plane)
        tl.store(target + 32 * half, byte.to(tl.uint8), mask=inside)


@triton.jit
def _store_nibbles(target, code, inside):
    for pair in tl.static_range(4):
        byte = code[2 * pair] | (code[2 * pair + 1] << 4)
        tl.store(target + 32 * pair, byte.to(tl.uint8), mask=inside)


@triton.jit
def _store_sixes(target, code, inside):
    for half in tl.static_range(2):
        high = code[4 * half] >> 4
        for plane in tl.static_range(1, 4):
            high |= (code[4 * half + plane] >> 4) << (2 * plane)
        tl.store(target + 128 + 32 * half, high.to(tl.uint8), mask=inside)
        for plane in tl.static_range(2):
            byte = (code[4 * half + plane] & 15) | ((code[4 * half + plane + 2] & 15) << 4)
            tl.store(target + 64 * half + 32 * plane, byte.to(tl.uint8), mask=inside)
