"""The compiled sum and rounding against ml_dtypes and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.quant.fused_add import add_to_bfloat16, add_to_float32

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ALL = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16)
FINITE = ALL[np.isfinite(ALL.astype(np.float32))]


def _added(stored: np.ndarray, delta: np.ndarray) -> np.ndarray:
    out = np.empty_like(stored)
    add_to_bfloat16(stored, delta, out)
    return out


def test_nothing_added_changes_no_number() -> None:
    stored = FINITE[: FINITE.size // 7 * 7].reshape(7, -1)
    out = _added(stored, np.zeros(stored.shape))
    assert (out.astype(np.float32) == stored.astype(np.float32)).all()  # -0 + 0 is 0


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FINITE[np.abs(FINITE.astype(np.float32)) < 1e30].tolist()), st.floats(-1e30, 1e30))
def test_each_sum_is_rounded_once_to_the_nearest_number(stored: float, delta: float) -> None:
    out = _added(np.array([[stored]], BFLOAT16), np.array([[delta]]))[0, 0]
    exact = Fraction(float(np.float64(stored) + np.float64(delta)))
    distances = {float(value): abs(Fraction(float(value)) - exact) for value in _neighbours(out)}
    least = min(distances.values())
    assert distances[float(out)] == least
    if sum(distance == least for distance in distances.values()) > 1:  # a tie: the last bit is even
        assert not out.view(np.uint16) & 1


def _neighbours(value: np.ndarray) -> list[np.ndarray]:
    bits = int(value.view(np.uint16))
    around = [np.uint16(bits + step) for step in (-1, 0, 1) if 0 <= bits + step < 1 << 16]
    found = [image.view(BFLOAT16) for image in around]
    return [one for one in found if np.isfinite(one.astype(np.float32))]


@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_sum_beside_a_midpoint_that_float32_cannot_tell_from_it_falls_to_its_side(side: int) -> None:
    stored = np.full((3, 700), 1.0, BFLOAT16)
    out = _added(stored, np.full(stored.shape, 2.0**-8 + side * 2.0**-40))  # half of the last place of 1.0
    assert (out.astype(np.float64) == (1 + 2.0**-7 if side > 0 else 1.0)).all()


def test_nan_stays_nan_and_what_is_beyond_the_type_becomes_infinite() -> None:
    stored = np.array([[1.0, 3e38, -3e38, np.nan, np.inf]], BFLOAT16)
    delta = np.array([[np.nan, 1e38, -1e38, 0.0, -np.inf]])
    out = _added(stored, delta).astype(np.float32)[0]
    assert np.isnan(out[[0, 3, 4]]).all()
    assert out[1:3].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1500])
def test_float32_sums_and_the_norms_of_lines_are_those_of_float64(width: int) -> None:
    generator = np.random.default_rng(width)
    stored = generator.standard_normal((5, width)).astype(BFLOAT16)
    delta, out = generator.standard_normal((5, width)), np.empty((5, width), np.float32)
    wide = stored.astype(np.float64)
    for norms in (add_to_float32(stored, delta, out), add_to_bfloat16(stored, delta, np.empty_like(stored))):
        # n additions of float64 in any order: n * 2^-53
        assert np.allclose(norms, (wide**2).sum(1), rtol=width * 2.0**-53, atol=0)
    assert (out == (wide + delta).astype(np.float32)).all()
