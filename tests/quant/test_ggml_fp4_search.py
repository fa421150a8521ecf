"""MXFP4 against libggml's, byte for byte, and against the nearest values in float64."""

from __future__ import annotations

import numpy as np
import pytest

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.codec import dequantize, quantize, quantize_rows
from quantpress.quant.ggml.types import ggml_type
from tests.quant.searched_rows import DISTRIBUTIONS, almost_nothing, assert_same_blocks, trained_rows

LEAST = 2.0**-125  # of a block's greatest magnitude: libggml's exponent of a smaller one is negative, undefined in C


@pytest.mark.parametrize("distribution", [kind for kind in DISTRIBUTIONS if kind is not almost_nothing])
def test_blocks_are_libggmls(distribution, libggml):
    rows = distribution(np.random.default_rng(0)).astype(np.float32)
    assert_same_blocks("MXFP4", quantize("MXFP4", rows), libggml.quantize(ggml_type("MXFP4"), rows))


def test_trained_rows_are_libggmls(shared, libggml):
    for rows in trained_rows(shared, 32):
        assert_same_blocks("MXFP4", quantize("MXFP4", rows), libggml.quantize(ggml_type("MXFP4"), rows))


def test_the_exponent_is_the_floor_of_a_float32_logarithm_as_in_libggml(libggml):
    """The 60 numbers on both sides of each power of two, as the greatest of a block; log2f rounds some of them up."""
    powers = np.ldexp(np.float32(1), np.arange(-124, 128)).astype(np.float32)
    near = (powers.view(np.int32)[:, None] + np.arange(-60, 60)).astype(np.int32).view(np.float32)
    near = np.concatenate([near.reshape(-1), np.nextafter(np.float32(np.inf), np.float32(0)) - np.zeros(1, "f4")])
    rng = np.random.default_rng(1)
    rows = near[:, None] * rng.uniform(-1, 1, (near.size, 32)).astype(np.float32)
    rows[np.arange(near.size), rng.integers(0, 32, near.size)] = near
    assert_same_blocks("MXFP4", quantize("MXFP4", rows), libggml.quantize(ggml_type("MXFP4"), rows))


def test_values_between_two_levels_go_where_libggml_puts_them(libggml):
    rng = np.random.default_rng(5)
    middles = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(9)), [0, 6]])
    rows = rng.choice(near, (2000, 32)) * rng.choice([-1, 1], (2000, 32))
    rows[:, 0] = 6
    rows = np.ldexp(rows, rng.integers(-120, 121, (2000, 1))).astype(np.float32)
    assert_same_blocks("MXFP4", quantize("MXFP4", rows), libggml.quantize(ggml_type("MXFP4"), rows))


def test_blocks_too_small_for_an_exponent_get_the_least_one():
    """No value is farther from what is stored than half of the least magnitude, 2^-127, and nothing is NaN."""
    rows = np.random.default_rng(2).uniform(-LEAST, LEAST, (64, 32)).astype(np.float32) * np.float32(0.7)
    data = quantize("MXFP4", rows)
    assert not data[:, 0].any()
    # levels of the least exponent are multiples of 2^-128 up to 12; the gaps between the last three are 2 and 4 wide
    off = np.abs(dequantize("MXFP4", data, 32).astype(np.float64) - rows)
    assert off.max() <= 2 * 2.0**-128


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_codes_are_the_nearest_in_float64(power):
    rows = np.ldexp(np.random.default_rng(3).standard_normal((64, 32)), power).astype(np.float32)
    found = dequantize("MXFP4", quantize("MXFP4", rows), 32).astype(np.float64)
    scale = np.ldexp(1.0, np.floor(np.log2(np.abs(rows.astype(np.float64)).max(axis=1))).astype(int) - 2)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([-levels, levels]) * scale[:, None, None]
    best = np.abs(levels - rows[:, :, None].astype(np.float64)).min(axis=2)
    np.testing.assert_array_equal(np.abs(found - rows), best)


def test_the_greatest_finite_numbers_stay_finite():
    rows = np.full((1, 32), np.finfo(np.float32).max, np.float32)
    assert np.isfinite(dequantize("MXFP4", quantize("MXFP4", rows), 32)).all()


def test_importance_changes_nothing():
    rows = np.random.default_rng(4).standard_normal((3, 512)).astype(np.float32)
    importance = np.arange(512, dtype=np.float32)
    np.testing.assert_array_equal(quantize_rows("MXFP4", rows, importance), quantize("MXFP4", rows))


def test_a_block_worked_out_by_hand():
    """The levels of E2M1 and, from weight 16 on, their negatives: 6 has exponent 2, so the scale is 2^0, byte 127."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2, np.float32)
    block = quantize("MXFP4", np.concatenate([values, -values])[None])
    assert block.tobytes().hex() == "7f" + "0091a2b3c4d5e6f7" * 2


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_never_become_a_block(wild):
    rows = np.ones((4, 256), np.float32)
    rows[2, 7] = wild
    with pytest.raises(LayoutError, match="blocks need"):
        quantize("MXFP4", rows)
