"""libggml's search for Q4_0, Q4_1, Q5_0 and Q5_1 with importance: one lane for each block of 32 weights.

Sources: quantize_row_q4_0_impl and its neighbours in llama.cpp's ggml-quants.c. A weight counts by its importance times
the root of the mean square of its whole row and its own square, so rows are summed first, from the first weight to the
last. The searches are those of the K-quants.

`work` is (2, blocks) float32: two numbers that give back the codes, factor and offset of `pack_legacy`.
"""

# Triton functions have no types, and starred elements are not compiled.
# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from quantpress.kernels.kquants.blocks import fit_minimum
from quantpress.kernels.kquants.search import (
    load_four,
    load_values,
    load_weights,
    nearest,
    search_signed,
    store_half,
)  # fmt: skip

__all__ = ["mean_squares_of_rows", "pack_legacy", "search_legacy"]


@triton.jit
def mean_squares_of_rows(values, target, rows, columns, block: tl.constexpr):
    """Mean squares of rows, one lane for each; lanes read far apart, but whole sectors that stay in the cache."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    place = tl.minimum(lane, rows - 1) * columns
    found = tl.zeros((block,), tl.float32)
    for start in range(0, columns, 32):
        for inner in tl.static_range(0, 32, 4):
            first, second, third, fourth = load_four(values, place + start + inner)
            found = found + first * first
            found = found + second * second
            found = found + third * third
            found = found + fourth * fourth
    many = tl.full((block,), 1.0, tl.float32) * columns.to(tl.float32)
    tl.store(target + lane, tl.div_rn(found, many), mask=lane < rows)


@triton.jit
def search_legacy(
    values, importance, squares, work, blocks, total, columns, bits: tl.constexpr, minimum: tl.constexpr,
    block_bytes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Step of each block, with a `minimum` or without; stored as float16."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    index = tl.minimum(lane, total - 1)
    value = load_values(values, index * 32, 32)
    shared = tl.load(squares + index // (columns // 32))
    weight = load_weights(value, importance, index * 32, columns, shared, 32, False)
    inside = lane < total
    target = blocks + index * block_bytes
    if minimum:
        step, low, factor, offset = fit_minimum(value, weight, 32, (1 << bits) - 1, -0.9, 0.05, 36, False, True)
        store_half(target + 2, low, inside)
        tl.store(work + total + lane, offset, mask=inside)
    else:
        step, factor = search_signed(value, weight, 32, 1 << (bits - 1))
    store_half(target, step, inside)
    tl.store(work + lane, factor, mask=inside)


@triton.jit
def pack_legacy(
    values, work, blocks, total, bits: tl.constexpr, minimum: tl.constexpr, block_bytes: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Fills in the codes: a lane for each byte of two weights that lie 16 apart; fifth bits go 8 to a byte."""
    lane = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    index = lane // 16
    place = lane % 16
    inside = index < total
    low = _code(values, work, total, index, place, inside, bits, minimum)
    high = _code(values, work, total, index, place + 16, inside, bits, minimum)
    start: tl.constexpr = block_bytes - 16
    tl.store(blocks + index * block_bytes + start + place, ((low & 15) | ((high & 15) << 4)).to(tl.uint8), mask=inside)
    if bits == 5:
        eight = tl.arange(0, 8)[None, :]
        for half in tl.static_range(2):
            code = low if half == 0 else high
            byte = tl.sum(tl.reshape(code >> 4, (block // 8, 8)) << eight, axis=1)
            owner = tl.program_id(0).to(tl.int64) * (block // 8) + tl.arange(0, block // 8)
            target = owner // 2 * block_bytes + start - 4 + 2 * half + owner % 2
            tl.store(blocks + target, byte.to(tl.uint8), mask=owner // 2 < total)


@triton.jit
def _code(values, work, total, index, place, inside, bits: tl.constexpr, minimum: tl.constexpr):
    value = tl.load(values + index * 32 + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(work + index, mask=inside, other=0.0)
    if minimum:
        offset = tl.load(work + total + index, mask=inside, other=0.0)
        code = tl.minimum(tl.maximum(nearest(factor * (value - offset)), 0), (1 << bits) - 1)
    else:
        half: tl.constexpr = 1 << (bits - 1)
        code = tl.minimum(tl.maximum(nearest(factor * value), -half), half - 1) + half
        code = tl.where(factor == float("inf"), 0, code)  # nothing was found
    return code
