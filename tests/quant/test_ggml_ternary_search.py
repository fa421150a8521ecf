"""TQ1_0 and TQ2_0 against libggml's, byte for byte, and against digits worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.codec import dequantize, quantize, quantize_rows
from quantpress.quant.ggml.types import ggml_type
from tests.quant.searched_rows import DISTRIBUTIONS, assert_same_blocks, trained_rows

TYPES = ["TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_libggmls(name, distribution, libggml):
    rows = distribution(np.random.default_rng(0)).astype(np.float32)
    assert_same_blocks(name, quantize(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("name", TYPES)
def test_trained_rows_are_libggmls(name, shared, libggml):
    for rows in trained_rows(shared, 256):
        assert_same_blocks(name, quantize(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("name", TYPES)
def test_what_is_rounded_up_and_down_around_half_of_the_scale_is_libggmls(name, libggml):
    rng = np.random.default_rng(3)
    scale = np.float32(np.exp(rng.uniform(np.log(1e-9), np.log(6e4), (1000, 1))))
    half = scale * np.float32(0.5)
    near = np.concatenate([half, -half, np.nextafter(half, scale), np.nextafter(half, -scale), 0 * half, scale], axis=1)
    rows = np.take_along_axis(near, rng.integers(0, 6, (1000, 256)), axis=1) * rng.choice([-1, 1], (1000, 256))
    rows[:, :1] = scale
    rows = rows.astype(np.float32)
    assert_same_blocks(name, quantize(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("name", TYPES)
def test_ternary_weights_are_kept_exactly(name):
    rng = np.random.default_rng(1)
    rows = (rng.integers(-1, 2, (8, 512)) * np.float16(0.0371)).astype(np.float32)
    np.testing.assert_array_equal(dequantize(name, quantize(name, rows), 512), rows)


@pytest.mark.parametrize("name", TYPES)
def test_importance_changes_nothing(name):
    rows = np.random.default_rng(2).standard_normal((3, 512)).astype(np.float32)
    importance = np.arange(512, dtype=np.float32)
    np.testing.assert_array_equal(quantize_rows(name, rows, importance), quantize(name, rows))


@pytest.mark.parametrize("name", TYPES)
def test_every_block_that_needs_a_scale_beyond_float16_is_counted(name):
    rows = np.ones((2, 512), np.float32)
    rows[0, 40], rows[0, 300], rows[1, 511] = 65520, 65519, -3e38
    with pytest.raises(LayoutError, match="2 of 4 blocks"):
        quantize(name, rows)


def test_digits_worked_out_by_hand():
    """All weights -1 are digits 0; one weight of +1 in front of them is 2 * 81 of 243, as 256ths rounded up 171."""
    values = np.full((1, 256), -1, np.float32)
    assert quantize("TQ1_0", values).tobytes().hex() == "00" * 52 + "003c"
    assert quantize("TQ2_0", values).tobytes().hex() == "00" * 64 + "003c"
    values[0, 0] = values[0, 240] = 1
    # weights 240 to 255 are in the last four bytes, and those begin with a digit of the same worth
    assert quantize("TQ1_0", values).tobytes().hex() == "ab" + "00" * 47 + "ab" + "00" * 3 + "003c"
    assert quantize("TQ2_0", values).tobytes().hex() == "02" + "00" * 47 + "80" + "00" * 15 + "003c"


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TYPES)
def test_nonfinite_weights_never_become_a_block(name, wild):
    rows = np.ones((4, 256), np.float32)
    rows[2, 7] = wild
    with pytest.raises(LayoutError, match="blocks need"):
        quantize(name, rows)
