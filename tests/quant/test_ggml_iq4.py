"""IQ4_NL and IQ4_XS against libggml's, byte for byte."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.codec import dequantize, quantize, quantize_rows
from quantpress.quant.ggml.types import ggml_type
from tests.quant.searched_rows import DISTRIBUTIONS, assert_same_blocks, corners, importances, trained_rows

TYPES = ["IQ4_NL", "IQ4_XS"]
IMPORTANCES = importances()
LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_libggmls(name, distribution, libggml):
    rows = distribution(np.random.default_rng(0)).astype(np.float32)
    assert_same_blocks(name, quantize(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", TYPES)
def test_blocks_with_importance_are_libggmls(name, distribution, importance, libggml):
    rows = distribution(np.random.default_rng(1)).astype(np.float32)
    wanted = libggml.quantize(ggml_type(name), rows, importance)
    assert_same_blocks(name, quantize_rows(name, rows, importance), wanted)


@pytest.mark.parametrize("name", TYPES)
def test_trained_rows_are_libggmls(name, shared, libggml):
    rng = np.random.default_rng(2)
    for rows in trained_rows(shared, 256):
        importance = rng.gamma(0.5, 1, rows.shape[1]).astype(np.float32)
        assert_same_blocks(name, quantize(name, rows), libggml.quantize(ggml_type(name), rows))
        wanted = libggml.quantize(ggml_type(name), rows, importance)
        assert_same_blocks(name, quantize_rows(name, rows, importance), wanted)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_values_at_the_middle_of_two_levels_go_where_libggml_puts_them(weighted, libggml):
    """In units of the scale that puts the extreme value on -127, or of a power of two, where nothing is rounded."""
    rng = np.random.default_rng(7)
    middles = np.float32([(low + high) / 2 for low, high in pairwise(LEVELS)])
    near = np.concatenate([middles, np.nextafter(middles, np.float32(-200)), np.float32(LEVELS)])
    rows = rng.choice(near, (2000, 32))
    rows[:, 5] = -127
    rows *= np.where(rng.random((2000, 1)) < 0.5, np.exp2(rng.integers(-20, 9, (2000, 1))), rng.random((2000, 1)))
    rows = rows.astype(np.float32)
    importance = np.linspace(0, 2, 32, dtype=np.float32) if weighted else None
    wanted = libggml.quantize(ggml_type("IQ4_NL"), rows, importance)
    assert_same_blocks("IQ4_NL", quantize_rows("IQ4_NL", rows, importance), wanted)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", TYPES)
def test_odd_blocks_are_libggmls(name, weighted, libggml):
    rng = np.random.default_rng(8)
    for counted in (1, 2, 32, 200):
        rows = corners(rng, 1600).reshape(-1, 256)
        importance = np.zeros(256, np.float32)
        importance[rng.permutation(256)[:counted]] = rng.random(counted)
        given = importance if weighted else None
        assert_same_blocks(name, quantize_rows(name, rows, given), libggml.quantize(ggml_type(name), rows, given))


@pytest.mark.parametrize("name", TYPES)
def test_a_block_depends_on_nothing_around_it(name):
    """Rows of three blocks: chunks of 65,536 values and tiles of 64 blocks end within rows."""
    rng = np.random.default_rng(3)
    columns = 3 * ggml_type(name).block_size
    rows = rng.standard_normal((70000 // columns, columns)).astype(np.float32)
    importance = rng.random(columns).astype(np.float32)
    together = quantize_rows(name, rows, importance)
    apart = [quantize_rows(name, row[None], importance)[0] for row in rows[::37]]
    np.testing.assert_array_equal(together[::37], apart)


@pytest.mark.parametrize("name", TYPES)
def test_read_only_rows_are_taken_and_left_alone(name):
    rows = np.random.default_rng(4).standard_normal((3, 512)).astype(np.float32)
    before, importance = rows.copy(), np.ones(512, np.float32)
    wanted = quantize_rows(name, rows, importance)
    rows.setflags(write=False)
    importance.setflags(write=False)
    np.testing.assert_array_equal(quantize_rows(name, rows, importance), wanted)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("name", TYPES)
def test_every_block_that_needs_a_scale_beyond_float16_is_counted(name):
    rows = np.ones((4, 512), np.float32)
    rows[1, 40], rows[2, 300], rows[3, 511] = 1e30, 3e8, -3e38
    with pytest.raises(LayoutError, match=f"3 of {4 * 512 // ggml_type(name).block_size} blocks"):
        quantize(name, rows)


@pytest.mark.parametrize("name", TYPES)
def test_importance_lowers_the_error_it_weighs(name):
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((32, 1024)).astype(np.float32)
    importance = (rng.random(1024) ** 6).astype(np.float32)
    plain, weighted = (
        float((importance * (dequantize(name, quantize_rows(name, rows, given), 1024) - rows) ** 2).sum())
        for given in (None, importance)
    )
    assert weighted < 0.95 * plain


def test_a_block_worked_out_by_hand():
    """Levels themselves: scale 1 is 3C00, and each code is its level's number."""
    values = np.array([*LEVELS, *reversed(LEVELS)], np.float32)[None]
    assert quantize("IQ4_NL", values).tobytes().hex() == "003c" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TYPES)
def test_nonfinite_weights_never_become_a_block(name, wild):
    rows = np.ones((4, 256), np.float32)
    rows[2, 7] = wild
    with pytest.raises(LayoutError, match="blocks need"):
        quantize(name, rows)
    with pytest.raises(LayoutError, match="blocks need"):
        quantize_rows(name, rows, np.ones(256, np.float32))


def test_ties_that_cost_nothing_go_to_the_higher_level(libggml):
    """The levels themselves fix the scale at a power of two; the middles beside them are then exactly between two."""
    middles = [(low + high) / 2 for low, high in pairwise(LEVELS)]
    rows = np.ldexp(np.array([[*LEVELS, *middles, 0.0]]), np.arange(-9, 9)[:, None]).astype(np.float32)
    importance = np.array([1] * 16 + [0] * 16, np.float32)
    found = quantize_rows("IQ4_NL", rows, importance)
    assert_same_blocks("IQ4_NL", found, libggml.quantize(ggml_type("IQ4_NL"), rows, importance))
    np.testing.assert_array_equal(found[:, 2:] >> 4, np.tile([*range(1, 16), 8], (18, 1)))
