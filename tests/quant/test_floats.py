"""Casts against numpy's and ml_dtypes' own casts, the gguf package and libggml."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import (
    BFLOAT16,
    CHUNK,
    cast_float16,
    count_nonfinite,
    to_bfloat16,
    to_float16,
    to_float32,
)

SMALL_FLOATS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
SIZES = [0, 1, 7, 4099, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 131]


def every_bit_pattern(dtype):
    dtype = np.dtype(dtype)
    return np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)


def random_patterns(size, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32)


def plain_float16(values):
    with np.errstate(all="ignore"):
        return values.astype(np.float16)


def assert_same_bits(found, wanted):
    assert found.dtype == wanted.dtype
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    image = f"u{wanted.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(image)[~nan], wanted.view(image)[~nan])


@pytest.mark.parametrize("name", [*SMALL_FLOATS, "float16", "bfloat16"])
def test_every_value_of_a_small_float_becomes_the_same_float32(name):
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    values = every_bit_pattern(dtype)
    with np.errstate(invalid="ignore"):
        wanted = values.astype(np.float32)
    assert_same_bits(to_float32(values), wanted)


def test_every_bfloat16_becomes_the_same_float16_as_through_float32():
    values = every_bit_pattern(BFLOAT16)
    assert_same_bits(to_float16(values), plain_float16(values.astype(np.float32)))


def test_every_bfloat16_is_also_right_where_few_values_are_outside_the_normal_range():
    values = every_bit_pattern(BFLOAT16)
    spread = np.ones((16, values.size), BFLOAT16)
    spread[np.arange(values.size) % 16, np.arange(values.size)] = values
    wanted = plain_float16(values.astype(np.float32))
    for row in range(16):
        mine = np.arange(values.size) % 16 == row
        found = to_float16(spread[row])
        assert_same_bits(found[mine], wanted[mine])
        assert (found[~mine] == 1).all()


def test_float32_around_every_float16_and_every_midpoint_rounds_to_nearest_even():
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    midpoints = (finite[:-1] + finite[1:]) / 2
    exact = np.concatenate((finite, midpoints, np.array([65519.996, 65520, 65536, 1e30], np.float32)))
    near = np.concatenate((exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-1))))
    values = np.concatenate((near, -near))
    assert_same_bits(to_float16(values), plain_float16(values))


def test_random_float32_patterns_become_numpys_and_libggmls_float16(libggml):
    values = random_patterns(1 << 20)
    found = to_float16(values)
    assert_same_bits(found, plain_float16(values))
    assert_same_bits(found, libggml.to_float16(values).view(np.float16))


def test_weights_in_float32_become_numpys_float16():
    values = (np.random.default_rng(1).standard_normal(1 << 18) * 0.02).astype(np.float32)
    assert_same_bits(to_float16(values), plain_float16(values))


def test_random_patterns_with_nan_become_libggmls_and_ggufs_bfloat16(libggml):
    values = random_patterns(1 << 20, seed=2)
    halfway = (np.arange(0, 1 << 32, 1 << 15, dtype=np.uint64)).astype(np.uint32).view(np.float32)
    values = np.concatenate((values, halfway, [np.float32(np.nan)]))
    found = to_bfloat16(values)
    assert found.dtype == BFLOAT16
    np.testing.assert_array_equal(found.view(np.uint16), libggml.to_bfloat16(values))
    by_gguf = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    np.testing.assert_array_equal(found.view(np.uint16), by_gguf)


@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
def test_any_list_of_float32_is_cast_as_by_numpy_and_ml_dtypes(numbers):
    values = np.array(numbers, np.float32)
    assert_same_bits(to_float16(values), plain_float16(values))
    assert_same_bits(to_bfloat16(values).astype(np.float32), values.astype(BFLOAT16).astype(np.float32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [np.float32, np.float16, BFLOAT16, np.float64, np.int8])
def test_every_cast_fills_every_element_whatever_the_size(size, source, monkeypatch):
    values = (np.random.default_rng(size).standard_normal(size) * 3).astype(source)
    single = values.astype(np.float32)
    fresh = np.empty

    def poisoned(shape, dtype=float, **options):
        array = fresh(shape, dtype, **options)
        array.view(np.uint8)[...] = 0xFF  # NaN in every float type
        return array

    monkeypatch.setattr(np, "empty", poisoned)
    np.testing.assert_array_equal(to_float32(values), single)
    np.testing.assert_array_equal(to_float16(values), single.astype(np.float16))
    np.testing.assert_array_equal(to_bfloat16(values).astype(np.float32), single.astype(BFLOAT16).astype(np.float32))
    assert count_nonfinite(values) == 0


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">f8", ">i4", "u1", "?", "i8"])
def test_other_byte_orders_and_integers_are_cast(dtype):
    values = np.array([[0, 1, 2], [3, 100, 7]]).astype(dtype)
    wanted = values.astype(np.float32)
    np.testing.assert_array_equal(to_float32(values), wanted)
    np.testing.assert_array_equal(to_float16(values), wanted.astype(np.float16))
    np.testing.assert_array_equal(to_bfloat16(values).astype(np.float32), wanted)
    assert count_nonfinite(values) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16, np.float64])
def test_strided_transposed_and_unaligned_arrays_are_cast(dtype):
    values = np.arange(600).reshape(20, 30).astype(dtype)
    wanted = np.arange(600, dtype=np.float32).reshape(20, 30).astype(dtype).astype(np.float32)
    unaligned = np.frombuffer(b"\0" + values.tobytes(), np.uint8)[1:].view(dtype).reshape(20, 30)
    for view, result in ((values.T, wanted.T), (values[::3, ::2], wanted[::3, ::2]), (unaligned, wanted)):
        np.testing.assert_array_equal(to_float32(view), result)
        np.testing.assert_array_equal(to_float16(view), result.astype(np.float16))
        np.testing.assert_array_equal(to_bfloat16(view), result.astype(BFLOAT16))
        assert count_nonfinite(view) == 0


def test_a_cast_to_the_same_type_copies_nothing():
    for dtype, cast in ((np.float32, to_float32), (np.float16, to_float16), (BFLOAT16, to_bfloat16)):
        values = np.ones((3, 4), dtype)
        assert np.shares_memory(cast(values), values)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BFLOAT16, "float8_e4m3fn", "float8_e5m2"])
def test_nan_and_infinity_of_both_signs_are_counted_wherever_they_are(dtype):
    dtype = np.dtype(getattr(ml_dtypes, str(dtype), dtype)) if isinstance(dtype, str) else np.dtype(dtype)
    for size in (1, 5, CHUNK, CHUNK + 3):
        values = np.full(size, -1).astype(dtype)
        assert count_nonfinite(values) == 0
        for place in {0, size // 2, size - 1}:
            for sign in (1, -1):
                spoiled = values.copy()
                spoiled[place] = np.copysign(np.nan, sign)
                assert count_nonfinite(spoiled) == 1
                spoiled[place] = sign * np.inf  # float8_e4m3fn has no infinity and makes it NaN
                assert count_nonfinite(spoiled) == 1


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_every_nonfinite_pattern_is_counted(dtype):
    values = every_bit_pattern(dtype)
    with np.errstate(invalid="ignore"):
        wanted = np.count_nonzero(~np.isfinite(values.astype(np.float32)))
    assert count_nonfinite(values) == wanted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nonfinite_values_among_random_patterns_are_counted(dtype):
    words = np.random.default_rng(3).integers(0, 1 << 63, 50_000, dtype=np.uint64) * 2
    values = words.view(dtype)
    wanted = np.count_nonzero(~np.isfinite(values))
    assert wanted > 10
    assert count_nonfinite(values) == wanted
    with np.errstate(invalid="ignore", over="ignore"):
        single = values[np.abs(values) < 1e38].astype(np.float32)
    np.testing.assert_array_equal(to_float32(values[np.abs(values) < 1e38]), single)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_finite_values_that_float16_cannot_hold_are_counted(dtype):
    values = np.array([65504, 65519.9, 65520, -65520, 65536, 1e30, np.inf, -np.inf, np.nan, 0]).astype(dtype)
    half = plain_float16(values.astype(np.float32))
    wanted = np.count_nonzero(np.isinf(half) & np.isfinite(values.astype(np.float32)))
    assert wanted == (4 if dtype != BFLOAT16 else 6)  # bfloat16 rounds 65504 itself to 65536
    assert cast_float16(values)[1] == wanted
    padded = np.concatenate((np.ones(CHUNK, dtype), values, np.ones(CHUNK, dtype)))
    assert cast_float16(padded)[1] == wanted


def test_a_double_beyond_float32_is_refused_and_an_infinite_one_is_not():
    with pytest.raises(LayoutError, match="float64"):
        to_float32(np.array([1e39, np.inf]))
    np.testing.assert_array_equal(to_float32(np.array([1.5, np.inf, -np.inf])), [1.5, np.inf, -np.inf])


@pytest.mark.parametrize("dtype", ["c8", "O", "M8[s]", "S4"])
def test_types_that_are_not_real_numbers_are_refused(dtype):
    values = np.zeros(3, dtype)
    with pytest.raises(InputError, match="not a real number type"):
        to_float32(values)
    with pytest.raises(InputError, match="not a real number type"):
        count_nonfinite(values)
