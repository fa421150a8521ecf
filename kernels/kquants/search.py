"""The parts of libggml's K-quant search that several kernels use, one sub-block or super-block for each lane.

A lane keeps its weights in registers, as a tuple of tensors with one element for each lane, and adds in the order of
the C code. Whatever is called here is compiled into the kernel that calls it.
"""

# Triton functions have no types, their tuples grow, and starred elements are not compiled.
# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator,var-annotated"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "farthest", "improve", "load_four", "load_values", "load_weights", "nearest", "ordered_sum", "search_signed",
    "store_half", "store_values",
]  # fmt: skip

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, ties to even
_TINY = tl.constexpr(1e-15)  # TINY of kquants_types


@triton.jit
def load_four(source, place):
    """Loads elements place to place + 3 for each lane, in one instruction where they are aligned."""
    four = tl.load(source + place[:, None] + tl.arange(0, 4)[None, :]).to(tl.float32)
    even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def store_four(target, place, first, second, third, fourth, inside):
    """Stores elements place to place + 3 for each lane: Triton takes long to compile many small stores."""
    halves = tl.join(tl.join(first, third), tl.join(second, fourth))
    four = tl.reshape(halves, (first.shape[0], 4)).to(target.dtype.element_ty)
    tl.store(target + place[:, None] + tl.arange(0, 4)[None, :], four, mask=inside[:, None])


@triton.jit
def store_values(target, place, values, inside, count: tl.constexpr):
    """Stores a tuple as elements place to place + count - 1 of each lane."""
    for start in tl.static_range(0, count, 4):
        store_four(
            target, place + start, values[start], values[start + 1], values[start + 2], values[start + 3], inside
        )


@triton.jit
def store_half(target, step, inside):
    """Stores a float16 as two bytes and gives it back as float32."""
    half = step.to(tl.float16)
    bits = half.to(tl.uint16, bitcast=True).to(tl.int32)
    tl.store(target, (bits & 255).to(tl.uint8), mask=inside)
    tl.store(target + 1, (bits >> 8).to(tl.uint8), mask=inside)
    return half.to(tl.float32)


@triton.jit
def load_values(source, place, count: tl.constexpr):
    """Loads elements place to place + count - 1 for each lane."""
    found = ()
    for start in tl.static_range(0, count, 4):
        found = found + load_four(source, place + start)
    return found


@triton.jit
def load_weights(values, importance, place, columns, mean_square, count: tl.constexpr, bare: tl.constexpr):
    """Gives the weights with importance: it alone (`bare`), or times the root of mean square and square."""
    loaded = load_values(importance, place % columns, count)
    if bare:
        found = loaded
    else:
        found = ()
        for index in tl.static_range(count):
            found = found + (loaded[index] * tl.sqrt_rn(mean_square + values[index] * values[index]),)
    return found


@triton.jit
def nearest(values):
    """nearest_int of ggml-quants.c on a processor whose NaN is negative (x86): NaN gives 0, far numbers their bits."""
    bits = (values + _MAGIC).to(tl.int32, bitcast=True)
    return tl.where(values == values, (bits & 0x007FFFFF) - 0x00400000, 0)


@triton.jit
def ordered_sum(terms, count: tl.constexpr):
    """Sums a tuple from the first to the last."""
    total = terms[0]
    for index in tl.static_range(1, count):
        total = total + terms[index]
    return total


@triton.jit
def farthest(values, count: tl.constexpr):
    """Gives the value farthest from 0, the first of several; NaN does not count."""
    found = tl.zeros_like(values[0])
    distance = found
    for index in tl.static_range(count):
        farther = tl.abs(values[index]) > distance
        distance = tl.where(farther, tl.abs(values[index]), distance)
        found = tl.where(farther, values[index], found)
    return found


@triton.jit
def search_signed(values, weights, count: tl.constexpr, top: tl.constexpr):
    """make_qx_quants with rmse_type 1.

    Returns:
        The scale, and the factor that gives the codes; infinity where all codes are 0 because there is nothing.
    """
    extreme = farthest(values, count)
    products = ()
    for index in tl.static_range(count):
        products = products + (weights[index] * values[index],)
    chosen = tl.div_rn(tl.full(extreme.shape, -top, tl.float32), extreme)
    sum_lx, sum_l2 = _signed_sums(values, weights, products, chosen, count, top)
    scale = tl.where(sum_l2 != 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    step = tl.full(extreme.shape, -9.0, tl.float32)
    for _ in range(19):
        inverse = tl.div_rn(-(top + 0.1 * step), extreme)
        sum_lx, sum_l2 = _signed_sums(values, weights, products, inverse, count, top)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        better = better & (step != 0.0)  # that was the first; products that are rounded can prefer it once more
        found = tl.div_rn(sum_lx, sum_l2)
        scale = tl.where(better, found, scale)
        best = tl.where(better, found * sum_lx, best)
        chosen = tl.where(better, inverse, chosen)
        step += 1.0
    nothing = tl.abs(extreme) < _TINY
    return tl.where(nothing, 0.0, scale), tl.where(nothing, float("inf"), chosen)


@triton.jit
def _signed_sums(values, weights, products, inverse, count: tl.constexpr, top: tl.constexpr):
    sum_lx = tl.zeros_like(inverse)
    sum_l2 = tl.zeros_like(inverse)
    for index in tl.static_range(count):
        # bounds are whole numbers: it is the same to clamp before rounding
        bounded = tl.minimum(tl.maximum(inverse * values[index], -top), top - 1.0)
        code = (bounded + _MAGIC) - _MAGIC
        sum_lx += products[index] * code
        sum_l2 += weights[index] * code * code
    return sum_lx, sum_l2


@triton.jit
def improve(
    values, weights, codes, sum_lx, sum_l2, count: tl.constexpr, low: tl.constexpr, high: tl.constexpr,
    signed: tl.constexpr,
):  # fmt: skip
    """One round of make_q3_quants (`signed`) or make_qp_quants: codes move, one at a time, where that helps.

    Codes that are not signed are stored as bytes by the C code.
    """
    moved = ()
    for index in tl.static_range(count):
        value = values[index]
        weight = weights[index]
        old = codes[index].to(tl.float32)
        rest_lx = sum_lx - weight * value * old
        rest_l2 = sum_l2 - weight * old * old
        code = tl.minimum(nearest(tl.div_rn(value * rest_l2, rest_lx)), high)
        if signed:
            code = tl.maximum(code, low)
        new = code.to(tl.float32)
        new_lx = rest_lx + weight * value * new
        new_l2 = rest_l2 + weight * new * new
        positive = new_l2 > 0.0 if signed else rest_l2 > 0.0
        better = (rest_lx > 0.0) & positive & (code != codes[index])
        better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
        if not signed:
            code = code & 255
        moved = moved + (tl.where(better, code, codes[index]),)
        sum_lx = tl.where(better, new_lx, sum_lx)
        sum_l2 = tl.where(better, new_l2, sum_l2)
    return moved, sum_lx, sum_l2
