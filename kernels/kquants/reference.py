"""What the K-quant kernels compute, in plain numpy: libggml's search with the roundings of float32, in its order.

Sources: make_qkx2_quants, make_qkx3_quants, make_qp_quants, make_qx_quants, make_q3_quants and quantize_row_q*_K_ref,
quantize_row_q*_K_impl in llama.cpp's ggml-quants.c. The C code's arithmetic is strict there: no operations are fused
and sums run from the first weight to the last. Rows below are sub-blocks (S, size) or super-blocks (B, 8 or 16).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.kernels.kquants.layouts import high_bits, join, pack_six_bits, planes, unpack_six_bits
from quantpress.kernels.kquants.types import KQUANTS, SUPER, TINY, KQuant, Steps

__all__ = ["reference_quantize"]

Array: TypeAlias = NDArray[Any]
_F = np.float32


def reference_quantize(values: Array, name: str, importance: Array | None = None) -> Array:
    """Does what `kquants.quantize` does, on the processor.

    Args:
        values: (N, K) float32, K a multiple of 256.
        name: of a type in `KQUANTS`.
        importance: (K,) float32, or None.

    Returns:
        (N, K / 256 * bytes of a block) uint8.
    """
    kind = KQUANTS[name]
    blocks = np.ascontiguousarray(values, _F).reshape(-1, SUPER)
    weight = None
    if importance is not None:
        weight = np.broadcast_to(_F(importance), values.shape).reshape(-1, SUPER)
    with np.errstate(all="ignore"):
        quantizer = _quantize_signed if kind.plain is None else _quantize_with_minimum
        found: Array = quantizer(blocks, kind, weight).reshape(len(values), -1)
    return found


def _quantize_with_minimum(blocks: Array, kind: KQuant, importance: Array | None) -> Array:
    sub = blocks.reshape(-1, kind.size)
    shape = (len(blocks), -1)
    if importance is None:
        weights = abs(sub)
        if kind.size == 32:
            weights = np.sqrt(_ordered_sum(sub * sub) / _F(32))[:, None] + weights
        scale, minimum, codes = _search_with_minimum(sub, weights, kind.top, kind.plain, bounded=False)
        total = None
    else:
        weights = _importance(blocks, kind, importance)
        total = _ordered_sum(weights).reshape(shape)
        scale, minimum, codes = _search_with_minimum(sub, weights, kind.top, kind.weighted, bounded=True)
    d, scale_codes = _scales_with_minimum(scale.reshape(shape), total, kind)
    d_min, min_codes = _scales_with_minimum(minimum.reshape(shape), total, kind)
    if kind.name == "Q5_K" or (importance is None and kind.size == 32):
        scale_codes, min_codes = np.minimum(scale_codes, kind.scale_top), np.minimum(min_codes, kind.scale_top)
    half, half_min = d.astype(np.float16), d_min.astype(np.float16)
    if kind.size == 16:
        packed = (scale_codes | min_codes << 4) & 255
        scale_codes, min_codes = packed & 15, packed >> 4
    else:
        packed = pack_six_bits(scale_codes, min_codes)
        scale_codes, min_codes = unpack_six_bits(packed)
    step = (half.astype(_F)[:, None] * scale_codes.astype(_F)).reshape(-1, 1)
    offset = (half_min.astype(_F)[:, None] * min_codes.astype(_F)).reshape(-1, 1)
    again = np.clip(_nearest((sub + offset) / step), 0, kind.top)
    codes = np.where(step == 0, codes, again).reshape(-1, 8, 32)
    heads = np.stack([half, half_min], axis=1).view(np.uint8)
    if kind.name == "Q2_K":
        return join(packed, planes(codes, 2), heads)
    if kind.name == "Q4_K":
        return join(heads, packed, planes(codes, 4))
    return join(heads, packed, high_bits(codes >> 4), planes(codes & 15, 4))


def _quantize_signed(blocks: Array, kind: KQuant, importance: Array | None) -> Array:
    sub = blocks.reshape(-1, 16)
    shape = (len(blocks), 16)
    if kind.name == "Q6_K":
        scale, codes = _search_signed(sub, sub * sub if importance is None else importance.reshape(-1, 16), 32)
        return _finish_q6(blocks, scale.reshape(shape), codes)
    if importance is None:
        scale, codes = _search_q3(sub)
        d, scale_codes = _signed_scales_by_maximum(scale.reshape(shape))
    else:
        weights = _importance(blocks, kind, importance)
        scale, codes = _search_signed(sub, weights, 4)
        d, scale_codes = _search_signed(scale.reshape(shape), _ordered_sum(weights).reshape(shape), 32)
    half = d.astype(np.float16)
    step = (half.astype(_F)[:, None] * (scale_codes - 32).astype(_F)).reshape(-1, 1)
    again = np.clip(_nearest(sub / step), -4, 3) + 4
    codes = np.where(step == 0, codes, again).reshape(-1, 8, 32)
    low = (scale_codes[:, :8] & 15) | (scale_codes[:, 8:] & 15) << 4
    high = np.bitwise_or.reduce((scale_codes >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6])[:, None], axis=1)
    return join(high_bits(codes >> 2), planes(codes & 3, 2), low, high, half[:, None].view(np.uint8))


def _finish_q6(blocks: Array, scale: Array, codes: Array) -> Array:
    extreme = _farthest(scale)
    inverse = _F(-128) / extreme
    half = (_F(1) / inverse).astype(np.float16)
    scale_codes = np.minimum(_nearest(inverse[:, None] * scale), 127)
    step = (half.astype(_F)[:, None] * scale_codes.astype(_F)).reshape(-1, 1)
    again = np.clip(_nearest(blocks.reshape(-1, 16) / step), -32, 31) + 32
    codes = np.where(step == 0, codes, again).reshape(-1, 2, 4, 32)
    low = np.stack([codes[:, :, plane] & 15 | (codes[:, :, plane + 2] & 15) << 4 for plane in (0, 1)], axis=2)
    high = np.bitwise_or.reduce((codes >> 4) << np.array([0, 2, 4, 6])[:, None], axis=2)
    packed = join(low, high, scale_codes & 255, half[:, None].view(np.uint8))
    packed[abs(extreme) < _F(TINY)] = 0
    return packed


def _importance(blocks: Array, kind: KQuant, importance: Array) -> Array:
    energy = (_F(kind.energy) * _ordered_sum(blocks * blocks) / _F(SUPER))[:, None]
    weights: Array = importance * np.sqrt(energy + blocks * blocks)
    return weights.reshape(-1, kind.size)


def _search_with_minimum(
    sub: Array, weights: Array, top: int, steps: Steps | None, *, bounded: bool
) -> tuple[Array, Array, Array]:
    """make_qkx2_quants; `bounded` make_qkx3_quants."""
    if steps is None:
        raise ValueError("this type has no minimum")
    minimum, highest = np.minimum(sub.min(axis=1), _F(0)), sub.max(axis=1)
    sum_w, sum_x = _ordered_sum(weights), _ordered_sum(weights * sub)
    flat = highest == minimum
    inverse = _F(top) / (highest - minimum)
    scale = _F(1) / inverse
    codes = np.clip(_nearest(inverse[:, None] * (sub - minimum[:, None])), 0, top)
    best = _distance(sub, weights, scale, minimum, codes, steps)
    first_minimum = minimum
    for step in range(steps.last + 1):
        inverse = (_F(steps.first) + _F(steps.delta) * _F(step) + _F(top)) / (highest - minimum)
        places = inverse[:, None] * (sub - minimum[:, None])
        tried = _nearest(np.where(places > 0, np.fmin(places, _F(top)), _F(0))) if bounded else _nearest(places)
        tried = np.clip(tried, 0, top)
        number = tried.astype(_F)
        sum_l, sum_l2 = _ordered_sum(weights * number), _ordered_sum(weights * number * number)
        sum_xl = _ordered_sum(weights * number * sub)
        divisor = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        new_scale = np.where(new_minimum > 0, sum_xl / sum_l2, new_scale)
        new_minimum = np.where(new_minimum > 0, _F(0), new_minimum)
        error = _distance(sub, weights, new_scale, new_minimum, tried, steps)
        better = (divisor > 0) & (error < best)
        best, scale = np.where(better, error, best), np.where(better, new_scale, scale)
        minimum, codes = np.where(better, new_minimum, minimum), np.where(better[:, None], tried, codes)
    scale, minimum = np.where(flat, _F(0), scale), np.where(flat, first_minimum, minimum)
    return scale, -minimum, np.where(flat[:, None], 0, codes)


def _distance(sub: Array, weights: Array, scale: Array, minimum: Array, codes: Array, steps: Steps) -> Array:
    off = scale[:, None] * codes.astype(_F) + minimum[:, None] - sub
    return _ordered_sum(weights * (abs(off) if steps.absolute else off * off))


def _search_signed(sub: Array, weights: Array, top: int) -> tuple[Array, Array]:
    """make_qx_quants with rmse_type 1: scales (S,) and codes + top (S, size)."""
    extreme = _farthest(sub)
    scale = best = codes = np.zeros(0, _F)
    for step in (0, *(number for number in range(-9, 10) if number)):
        inverse = -(_F(top) + _F(0.1) * _F(step)) / extreme
        tried = np.clip(_nearest(inverse[:, None] * sub), -top, top - 1)
        number = tried.astype(_F)
        sum_lx, sum_l2 = _ordered_sum(weights * sub * number), _ordered_sum(weights * number * number)
        found = np.where(sum_l2 != 0, sum_lx / sum_l2, _F(0))
        if not step:
            scale, best, codes = found, found * sum_lx, tried
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale, best = np.where(better, found, scale), np.where(better, found * sum_lx, best)
        codes = np.where(better[:, None], tried, codes)
    nothing = abs(extreme) < _F(TINY)
    return np.where(nothing, _F(0), scale), np.where(nothing[:, None], 0, codes + top)


def _search_q3(sub: Array) -> tuple[Array, Array]:
    """make_q3_quants with do_rmse: codes move one at a time as long as that helps, five rounds at most."""
    extreme = _farthest(sub)
    weights = sub * sub
    codes = np.clip(_nearest((_F(-4) / extreme)[:, None] * sub), -4, 3)
    sum_lx = _ordered_sum(weights * sub * codes.astype(_F))
    sum_l2 = _ordered_sum(weights * codes.astype(_F) * codes.astype(_F))
    for _ in range(5):
        sum_lx, sum_l2 = _improve(sub, weights, codes, sum_lx, sum_l2, low=-4, high=3)
    nothing = abs(extreme) < _F(TINY)
    scale = np.where(sum_l2 > 0, sum_lx / sum_l2, _F(0))
    return np.where(nothing, _F(0), scale), np.where(nothing[:, None], 0, codes + 4)


def _improve(
    sub: Array, weights: Array, codes: Array, sum_lx: Array, sum_l2: Array, *, low: int | None, high: int
) -> tuple[Array, Array]:
    """One round over the codes of each row; they change in place. Codes without `low` are stored as bytes."""
    for column in range(sub.shape[1]):
        value, weight, code = sub[:, column], weights[:, column], codes[:, column].astype(_F)
        rest_lx, rest_l2 = sum_lx - weight * value * code, sum_l2 - weight * code * code
        moved = np.minimum(_nearest(value * rest_l2 / rest_lx), high)
        moved = moved if low is None else np.maximum(moved, low)
        number = moved.astype(_F)
        new_lx, new_l2 = rest_lx + weight * value * number, rest_l2 + weight * number * number
        positive = (rest_l2 if low is None else new_l2) > 0
        better = (rest_lx > 0) & positive & (moved != codes[:, column])
        better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
        codes[:, column] = np.where(better, moved if low is not None else moved & 255, codes[:, column])
        sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
    return sum_lx, sum_l2


def _scales_with_minimum(values: Array, weights: Array | None, kind: KQuant) -> tuple[Array, Array]:
    """Step (B,) and codes (B, sub-blocks) of scales or minima; by the greatest where there are no weights."""
    if weights is not None:
        return _scales_by_search(values, weights, kind.scale_top)
    greatest = np.where(values > 0, values, _F(0)).max(axis=1)
    inverse = np.where(greatest > 0, _F(kind.scale_top) / greatest, _F(0))
    codes = _nearest(inverse[:, None] * values) & 255
    return greatest / _F(kind.scale_top), np.where(greatest[:, None] > 0, codes, 0)


def _signed_scales_by_maximum(values: Array) -> tuple[Array, Array]:
    extreme = _farthest(values)
    inverse = _F(-32) / extreme
    codes = np.clip(_nearest(inverse[:, None] * values), -32, 31) + 32
    return np.where(extreme != 0, _F(1) / inverse, _F(0)), np.where(extreme[:, None] != 0, codes, 0)


def _scales_by_search(values: Array, weights: Array, top: int) -> tuple[Array, Array]:
    """make_qp_quants."""
    greatest = np.where(values > 0, values, _F(0)).max(axis=1)
    chosen = best = np.zeros(0, _F)
    for step in (0, *(number for number in range(-4, 5) if number)):
        inverse = (_F(0.1) * _F(step) + _F(top)) / greatest
        tried = _nearest(inverse[:, None] * values)
        tried = np.minimum(tried, top) if step else tried & 255
        off = values - (_F(1) / inverse)[:, None] * tried.astype(_F)
        error = _ordered_sum(weights * off * off)
        better = error < best if step else np.ones(len(values), bool)
        best, chosen = (np.where(better, error, best), np.where(better, inverse, chosen)) if step else (error, inverse)
    codes = np.minimum(_nearest(chosen[:, None] * values), top)
    number = codes.astype(_F)
    sum_lx, sum_l2 = _ordered_sum(weights * values * number), _ordered_sum(weights * number * number)
    codes &= 255
    for _ in range(5):
        sum_lx, sum_l2 = _improve(values, weights, codes, sum_lx, sum_l2, low=None, high=top)
    nothing = greatest < _F(TINY)
    step_size = np.where(sum_l2 > 0, sum_lx / sum_l2, _F(0))
    return np.where(nothing, _F(0), step_size), np.where(nothing[:, None], 0, codes)


def _ordered_sum(terms: Array) -> Array:
    """Sums of rows from the first column to the last, each addition rounded."""
    total: Array = np.add.accumulate(terms, axis=1, dtype=_F)[:, -1]
    return total


def _nearest(values: Array) -> Array:
    """nearest_int: ties to even; beyond 2^22 what the bits of value + 1.5 * 2^23 happen to say, 0 for NaN."""
    bits = (values.astype(_F) + _F(12582912.0)).view(np.int32)
    return np.where(np.isnan(values), 0, (bits & 0x007FFFFF) - 0x00400000)


def _farthest(values: Array) -> Array:
    """The value farthest from 0 of each row, the first of several; NaN does not count."""
    numbers = np.where(np.isnan(values), _F(0), values)
    found: Array = np.take_along_axis(numbers, abs(numbers).argmax(axis=1)[:, None], axis=1)[:, 0]
    return found
