"""The compiled encoders of Q4_0, Q4_1, Q5_0 and Q5_1 against libggml's and numpy's, byte for byte."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml import search
from quantpress.quant.ggml.codec import quantize
from quantpress.quant.ggml.search import FAST, searcher
from quantpress.quant.ggml.types import ggml_type
from tests.quant.searched_rows import DISTRIBUTIONS, assert_same_blocks, corners, trained_rows

TYPES = list(FAST)


def encoded(name: str, rows: np.ndarray) -> np.ndarray:
    """By the compiled encoder, whatever the codec would choose."""
    encode = searcher(name, weighted=False, values=1 << 40)
    out = np.empty((rows.size // 32, ggml_type(name).block_bytes), np.uint8)
    assert encode is not None
    assert encode(rows.reshape(-1, 32), None, 0, out) == 0
    return out


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_libggmls(name, distribution, libggml):
    rows = distribution(np.random.default_rng(0)).astype(np.float32)
    assert_same_blocks(name, encoded(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("name", TYPES)
def test_odd_blocks_are_libggmls(name, libggml):
    """Ties of the greatest magnitude, zeros of both signs, subnormal numbers."""
    rows = corners(np.random.default_rng(1), 5001)
    rows[:100] = np.copysign(0, rows[:100])
    assert_same_blocks(name, encoded(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("name", TYPES)
def test_trained_rows_are_libggmls(name, shared, libggml):
    for rows in trained_rows(shared, 32):
        assert_same_blocks(name, encoded(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("name", TYPES)
def test_every_block_that_needs_a_scale_beyond_float16_is_counted(name):
    rows = np.ones((4, 64), np.float32)
    rows[1, 40], rows[2, 30], rows[3, 63] = 1e18, 3e7, -3e38
    assert "numba" in sys.modules
    with pytest.raises(LayoutError, match="3 of 8 blocks"):
        quantize(name, rows)


def test_few_values_do_not_load_numba_and_many_do():
    program = """
import sys
import numpy as np
from quantpress.quant.ggml import search
from quantpress.quant.ggml.codec import quantize
rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
few = quantize("Q4_1", rows)
assert "numba" not in sys.modules
search._WORTH_LOADING = 64
assert quantize("Q4_1", rows).tobytes() == few.tobytes()
assert "numba" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_encoded_without_numba_is_what_is_encoded_with_it(monkeypatch):
    rng = np.random.default_rng(2)
    materials = [corners(rng, 3000), *(distribution(rng).astype(np.float32) for distribution in DISTRIBUTIONS)]
    compiled = [[quantize(name, rows) for name in TYPES] for rows in materials]
    monkeypatch.setattr(search, "FAST", {})
    for rows, blocks in zip(materials, compiled, strict=True):
        for name, wanted in zip(TYPES, blocks, strict=True):
            assert_same_blocks(name, quantize(name, rows), wanted)


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TYPES)
def test_nonfinite_weights_never_become_a_block(name, wild):
    rows = np.ones((4, 256), np.float32)
    rows[2, 7] = wild
    with pytest.raises(LayoutError, match="blocks need"):
        quantize(name, rows)
