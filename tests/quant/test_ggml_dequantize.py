"""Decoders on random bytes against libggml's and the gguf package's, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import CHUNK
from quantpress.quant.ggml.codec import DECODERS, ENCODERS, PLAIN, dequantize, quantize
from quantpress.quant.ggml.iq import GRID_TYPES
from quantpress.quant.ggml.types import GGML_TYPES, ggml_type, row_bytes

WITHOUT_READER = {"Q8_1", "Q8_K"}  # formats of activations while computing; no file holds them
OWN_DECODERS = sorted(set(DECODERS) - set(GRID_TYPES))


def random_rows(name, rows, columns, seed=0):
    shape = rows, row_bytes(ggml_type(name), columns)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_same_bits(found, wanted):
    nan = np.isnan(wanted)
    assert nan.mean() < 0.2  # random float16 scales are NaN or infinite in 1 of 32 blocks
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_random_bytes_are_read_as_by_libggml(name, libggml):
    data = random_rows(name, 60, 2048)
    assert_same_bits(dequantize(name, data, 2048), libggml.dequantize(ggml_type(name), data, 2048))


@pytest.mark.parametrize("name", [name for name in OWN_DECODERS if name != "Q2_0" and name != "Q1_0"])
def test_random_bytes_are_read_as_by_the_gguf_package(name):
    data = random_rows(name, 60, 2048, seed=1)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert_same_bits(dequantize(name, data, 2048), wanted)


@pytest.mark.parametrize(("name", "dtype"), PLAIN.items())
def test_plain_types_are_read_as_numpy_reads_them(name, dtype):
    values = np.random.default_rng(2).integers(-100, 100, (5, 33)).astype(dtype)
    found = dequantize(name, values.view(np.uint8), 33)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_every_type_of_a_file_has_a_reader():
    assert set(GGML_TYPES) == set(DECODERS) | set(PLAIN) | WITHOUT_READER
    for name in WITHOUT_READER:
        with pytest.raises(LayoutError, match=f"no reader for {name}"):
            dequantize(name, random_rows(name, 1, 256), 256)


@pytest.mark.parametrize("name", OWN_DECODERS)
def test_every_weight_is_written_in_every_chunk(name, monkeypatch):
    columns = 256
    data = random_rows(name, CHUNK // columns + 3, columns, seed=3)
    whole = dequantize(name, data, columns)
    fresh = np.empty
    poison = 0xFF

    def poisoned(shape, dtype=float, **options):
        array = fresh(shape, dtype, **options)
        array.view(np.uint8)[...] = poison
        return array

    monkeypatch.setattr(np, "empty", poisoned)
    assert_same_bits(dequantize(name, data, columns), whole)
    poison = 0x55  # not NaN
    assert_same_bits(dequantize(name, data, columns), whole)
    assert_same_bits(dequantize(name, data[-64:], columns), whole[-64:])
    assert_same_bits(dequantize(name, data[None], columns), whole[None])


# Half a step, plus what rounding the scale (times the largest code) and the minimum to float16 costs: 2^-11 of each.
@pytest.mark.parametrize(("name", "steps"), [("Q8_0", 127), ("Q4_0", 8), ("Q4_1", 15), ("Q5_0", 16), ("Q5_1", 31)])
def test_a_weight_comes_back_within_half_a_step(name, steps):
    rows = np.random.default_rng(4).standard_normal((50, 320)).astype(np.float32)
    blocks = rows.reshape(-1, 32).astype(np.float64)
    symmetric = name.endswith("_0")
    span = np.abs(blocks).max(axis=1) if symmetric else np.ptp(blocks, axis=1)
    step = span / steps
    # Q4_0 and Q5_0 clip what lies opposite to the peak: up to a whole step there.
    reach = 1.0 if name in ("Q4_0", "Q5_0") else 0.5
    magnitude = np.abs(blocks).max(axis=1) + span
    error = np.abs(dequantize(name, quantize(name, rows), 320).reshape(-1, 32) - blocks).max(axis=1)
    assert (error <= reach * step + magnitude * 2.0**-11).all()
    assert name in ENCODERS


def test_bytes_that_do_not_fit_the_row_are_refused():
    with pytest.raises(LayoutError, match=r"64 weights of Q8_0 are rows of 68 bytes .*\(2, 34\)"):
        dequantize("Q8_0", np.zeros((2, 34), np.uint8), 64)
    with pytest.raises(LayoutError, match="int8"):
        dequantize("Q8_0", np.zeros((2, 34), np.int8), 32)
    with pytest.raises(LayoutError, match=r"Q4_K .*256"):
        dequantize("Q4_K", np.zeros((2, 144), np.uint8), 128)
