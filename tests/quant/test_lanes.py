"""Vectors of sixteen float32 against numpy, lane by lane, for every bit pattern where there are few."""

from __future__ import annotations

import numpy as np
import pytest

from quantpress.quant.compiled import compiled
from quantpress.quant.lane_bits import (
    half_bits,
    half_value,
    join_bits,
    load_transposed,
    nearest,
    store_bytes_transposed,
    take_bits,
)
from quantpress.quant.lanes import (
    LANES,
    absolute,
    both,
    either,
    load,
    root,
    round_small,
    select,
    set_lanes,
    splat,
    store,
)


@compiled()
def _unary(values, out):
    for place in range(0, values.size, LANES):
        vector = load(values, place)
        store(out[0], place, half_bits(vector))
        store(out[1], place, nearest(vector))
        store(out[2], place, round_small(vector))
        store(out[3], place, root(absolute(vector)))
        store(out[4], place, absolute(vector))


@compiled()
def _halves(bits, out):
    for place in range(0, bits.size, LANES):
        store(out, place, half_value(load(bits, place)))


@compiled()
def _binary(left, right, out, masks):
    one, other = load(left, 0), load(right, 0)
    store(out, 0, one + other)
    store(out, LANES, one - other)
    store(out, 2 * LANES, one * other)
    store(out, 3 * LANES, one / other)
    store(out, 4 * LANES, one * other + one)
    store(out, 5 * LANES, select(one < other, one, splat(np.float32(7))))
    masks[0], masks[1], masks[2] = set_lanes(one < other), set_lanes(one <= other), set_lanes(one > other)
    masks[3], masks[4], masks[5] = set_lanes(one >= other), set_lanes(one == other), set_lanes(one != other)
    masks[6] = set_lanes(both(one < other, one > splat(np.float32(0))))
    masks[7] = set_lanes(either(one < other, one > splat(np.float32(0))))


@compiled()
def _bits(left, right, out):
    store(out, 0, take_bits(load(left, 0), 3, 13))
    store(out, LANES, join_bits(load(left, 0), load(right, 0), 4))


@compiled()
def _turn(source, starts, target, column, place):
    load_transposed(source, starts, column, target, place)


@compiled()
def _turn_bytes(source, place, target, column, width):
    store_bytes_transposed(source, place, target, column, width)


def every_exponent():
    """float32 of every sign and exponent, at and around the places where float16 rounds."""
    high = np.arange(0, 2**32, 2**12, dtype=np.uint64)
    bits = np.concatenate([high, high + 1, high + 2**12 - 1]).astype(np.uint32)
    return bits.view(np.float32)


def unary(values):
    out = tuple(np.empty_like(values) for _ in range(5))
    _unary(values, out)
    return out


def test_float16_is_rounded_as_numpy_does_it():
    values = every_exponent()
    values = values[~np.isnan(values)]
    values = np.resize(values, -(-values.size // LANES) * LANES)
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    np.testing.assert_array_equal(unary(values)[0].astype(np.uint16), wanted.view(np.uint16))


def test_not_a_number_is_no_finite_float16():
    found = unary(np.full(LANES, np.nan, np.float32))[0].astype(np.int64)
    assert ((found & 0x7C00) == 0x7C00).all()


def test_every_finite_float16_is_read_as_numpy_does_it():
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    out = np.empty(bits.size, np.float32)
    _halves(bits.astype(np.float32), out)
    np.testing.assert_array_equal(out.view(np.uint32), bits.view(np.float16).astype(np.float32).view(np.uint32))


def test_rounding_roots_and_sizes_are_numpys():
    values = every_exponent()
    values = values[np.isfinite(values)]
    values = np.resize(values, -(-values.size // LANES) * LANES)
    _, wrapped, small, roots, sizes = unary(values)
    near = abs(values) < 2**22 - 1  # what is rounded up to 2^22 wraps around, as in libggml
    np.testing.assert_array_equal(small[near], np.rint(values[near]))
    np.testing.assert_array_equal(wrapped[near], np.rint(values[near]))
    # beyond it, what libggml's nearest_int makes of the bits
    moved = (values[~near] + np.float32(12582912)).view(np.int32)
    np.testing.assert_array_equal(wrapped[~near], (moved & 0x7FFFFF) - 0x400000)
    np.testing.assert_array_equal(roots, np.sqrt(abs(values)))
    np.testing.assert_array_equal(sizes.view(np.uint32), abs(values).view(np.uint32))


@pytest.mark.parametrize("seed", range(3))
def test_arithmetic_is_rounded_after_each_operation(seed):
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((2, LANES)).astype(np.float32)
    right[3], left[5], right[7] = left[3], np.nan, 0
    out, masks = np.empty(6 * LANES, np.float32), np.empty(8, np.int64)
    _binary(left, right, out, masks)
    with np.errstate(all="ignore"):
        wanted = [left + right, left - right, left * right, left / right, left * right + left]
        wanted.append(np.where(left < right, left, np.float32(7)))
    np.testing.assert_array_equal(out.reshape(6, LANES), wanted)
    lanes = [left < right, left <= right, left > right, left >= right, left == right, left != right]
    lanes += [(left < right) & (left > 0), (left < right) | (left > 0)]
    assert masks.tolist() == [sum(1 << lane for lane in np.flatnonzero(mask)) for mask in lanes]


def test_bits_are_taken_and_joined():
    left, right = np.random.default_rng(0).integers(0, 256, (2, LANES))
    out = np.empty(2 * LANES, np.float32)
    _bits(left.astype(np.float32), right.astype(np.float32), out)
    np.testing.assert_array_equal(out[:LANES], (left >> 3) & 13)
    np.testing.assert_array_equal(out[LANES:], (left | right << 4) & 255)


def test_tiles_are_turned_around():
    source = np.arange(3000, dtype=np.float32)
    starts = np.random.default_rng(0).permutation(LANES) * 150
    target = np.full(300, -1, np.float32)
    _turn(source, starts.astype(np.int64), target, 9, 32)
    wanted = source[starts[:, None] + 9 + np.arange(LANES)].T
    np.testing.assert_array_equal(target[32:288].reshape(LANES, LANES), wanted)
    assert (target[:32] == -1).all()
    assert (target[288:] == -1).all()


def test_bytes_are_turned_around():
    source = np.random.default_rng(0).integers(0, 256, 300).astype(np.float32)
    target = np.full((LANES, 40), 1, np.uint8)
    _turn_bytes(source, 16, target.reshape(-1), 5, 40)
    np.testing.assert_array_equal(target[:, 5:21], source[16:272].reshape(LANES, LANES).T)
    assert (target[:, :5] == 1).all()
    assert (target[:, 21:] == 1).all()
