"""One rounding from float64, against brute force over all values of the narrow types and numpy's own casts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.quant.errors import InputError
from quantpress.quant.float64 import from_float64, widen_to_float64
from quantpress.quant.floats import BFLOAT16, CHUNK, count_nonfinite

NARROW = [BFLOAT16, np.dtype(np.float16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)]
TYPES = [*NARROW, np.dtype(np.float32), np.dtype(np.float64)]


def finite_values(dtype):
    """All finite values of a type in ascending order, without -0."""
    with np.errstate(invalid="ignore"):
        values = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def nearest(values, dtype):
    """Rounds float64 within the range of a type by comparing with both neighbours; ties to the even image."""
    known = finite_values(dtype)
    above = np.clip(np.searchsorted(known, values), 1, len(known) - 1)
    low, high = known[above - 1], known[above]
    middle = low / 2 + high / 2  # exact: types this narrow leave room for one bit more
    low_is_even = low.astype(dtype).view(f"u{dtype.itemsize}") % 2 == 0
    return np.where((values < middle) | ((values == middle) & low_is_even), low, high)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_value_every_midpoint_and_what_lies_closest_to_them_is_rounded_to_nearest_even(dtype):
    known = finite_values(dtype)
    places = np.concatenate((known, known[:-1] / 2 + known[1:] / 2))
    # One step of float64 away is what float32 cannot tell from the midpoint.
    values = np.concatenate((places, np.nextafter(places, np.inf), np.nextafter(places, -np.inf), places * (1 + 1e-9)))
    values = values[np.abs(values) <= known[-1]]
    np.testing.assert_array_equal(from_float64(values, dtype).astype(np.float64), nearest(values, dtype))


def test_a_detour_over_float32_rounds_some_of_these_values_wrongly():
    # Guards the test above: without such values it would pass whatever the rounding.
    known = finite_values(BFLOAT16)
    midpoints = known[:-1] / 2 + known[1:] / 2
    values = np.nextafter(midpoints, np.inf)
    twice = values.astype(np.float32).astype(BFLOAT16).astype(np.float64)
    assert (twice != nearest(values, BFLOAT16)).sum() > 10_000


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(np.float32)], ids=str)
def test_any_bits_become_what_numpys_direct_cast_gives(dtype):
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(-25, 15, 1 << 18)) * rng.choice([-1, 1], 1 << 18)
    values = np.concatenate((rng.integers(0, 1 << 64, 1 << 18, dtype=np.uint64).view(np.float64), spread))
    with np.errstate(all="ignore"):
        wanted = values.astype(dtype)
    found = from_float64(values, dtype)
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    image = f"u{dtype.itemsize}"
    np.testing.assert_array_equal(found[~nan].view(image), wanted[~nan].view(image))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_signs_of_zeros_are_kept_and_what_is_too_small_becomes_zero(dtype):
    found = from_float64(np.array([0.0, -0.0, 1e-300, -1e-300, 5e-324]), dtype)
    np.testing.assert_array_equal(found.astype(np.float32), np.zeros(5))
    np.testing.assert_array_equal(np.signbit(found.astype(np.float32)), [False, True, False, True, False])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_infinity_and_overflow_are_counted_as_not_finite(dtype):
    all_ones = np.array([(1 << 64) - 1, (1 << 63) - 1, (0x7FF << 52) + 1], np.uint64).view(np.float64)
    values = np.concatenate((all_ones, [np.nan, np.inf, -np.inf]))
    for sample in (values, np.repeat(values, 1000)):
        assert count_nonfinite(from_float64(sample, dtype)) == sample.size
    assert (from_float64(all_ones, dtype) != from_float64(all_ones, dtype)).all()
    if dtype.itemsize < 8:
        assert count_nonfinite(from_float64(np.array([1e300, -1e300, 1.0]), dtype)) == 2


def test_the_last_number_that_rounds_down_to_the_largest_is_finite():
    for dtype, edge in ((BFLOAT16, 2.0**128 - 2.0**119), (np.dtype(np.float16), 65520.0)):
        below, at = from_float64(np.array([np.nextafter(edge, 0), edge]), dtype).astype(np.float64)
        assert below == finite_values(dtype)[-1]
        assert np.isinf(at)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4099, CHUNK // 2 - 1, CHUNK // 2, CHUNK + 131])
def test_every_element_is_filled_whatever_the_size(dtype, size):
    values = np.random.default_rng(size).standard_normal(size)
    kept = values.copy()
    found = from_float64(values, dtype)
    assert (found.shape, found.dtype) == ((size,), dtype)
    wanted = nearest(values, dtype) if dtype in NARROW else values.astype(dtype)
    np.testing.assert_array_equal(found.astype(np.float64), wanted)
    np.testing.assert_array_equal(values, kept)


@given(st.lists(st.floats(-400, 400), min_size=1, max_size=50), st.sampled_from(NARROW))
def test_any_list_of_numbers_is_rounded_to_nearest(numbers, dtype):
    values = np.array(numbers)
    np.testing.assert_array_equal(from_float64(values, dtype).astype(np.float64), nearest(values, dtype))


def test_shapes_are_kept_for_scalars_transposes_and_slices():
    values = np.random.default_rng(3).standard_normal((6, 10))
    for view in (values.T, values[::2, 1:5], values[0, 0], np.float64(1.5)):
        np.testing.assert_array_equal(from_float64(view, np.dtype(np.float32)), np.asarray(view).astype(np.float32))


def test_integers_are_no_target_and_no_source():
    with pytest.raises(InputError, match="int8"):
        from_float64(np.ones(3), np.dtype(np.int8))
    with pytest.raises(InputError, match="int16"):
        widen_to_float64(np.ones(3, np.int16), np.empty(3), np.empty(3))


def test_nan_with_all_bits_set_stays_nan_on_the_way_up_and_down():
    stored = np.array([0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 0x3F800000], np.uint32).view(np.float32)
    wide = np.empty(4)
    with np.errstate(invalid="ignore"):
        widen_to_float64(stored, wide, np.empty(2))
    for dtype in (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)):
        np.testing.assert_array_equal(from_float64(wide, dtype).astype(np.float64), [np.nan, np.nan, np.nan, 1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_widening_keeps_every_value(dtype):
    values = np.random.default_rng(4).standard_normal(4099).astype(dtype)
    out = np.full(values.size, np.nan)
    widen_to_float64(values, out, np.empty(values.size // 2 + 1))
    np.testing.assert_array_equal(out, values.astype(np.float64))
