"""Quantizers against libggml's and the gguf package's, byte for byte, and against blocks worked out by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import BFLOAT16, CHUNK
from quantpress.quant.ggml.codec import ENCODERS, quantize, quantize_rows
from quantpress.quant.ggml.types import ggml_type, row_bytes

BLOCK_TYPES = list(ENCODERS)
ALL_TYPES = ["F32", "F16", "BF16", *BLOCK_TYPES]
SCALES = [1e-40, 1e-37, 1e-30, 1e-8, 1e-5, 0.02, 1.0, 300.0]
SHAPE = (160, 256)  # x 8 scales x 5 distributions = 1.6 million weights per type


def normal(rng):
    return rng.standard_normal(SHAPE)


def heavy_tailed(rng):
    return np.clip(rng.standard_normal(SHAPE) ** 5, -150, 150)  # x 300 stays within float16


def with_ties(rng):
    return np.round(rng.standard_normal(SHAPE) * 3) / 4


def sparse_and_positive(rng):
    return np.abs(rng.standard_normal(SHAPE)) * (rng.random(SHAPE) < 0.3)


def signed_zeros_and_outliers(rng):
    values = np.copysign(0.0, rng.standard_normal(SHAPE))
    values[rng.random(SHAPE) < 0.02] = 1
    return values


DISTRIBUTIONS = [normal, heavy_tailed, with_ties, sparse_and_positive, signed_zeros_and_outliers]


def by_gguf(name, rows):
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(len(rows), -1)


def assert_same_blocks(name, found, wanted):
    width = ggml_type(name).block_bytes
    bad = np.flatnonzero((found.reshape(-1, width) != wanted.reshape(-1, width)).any(axis=1))
    first = {who: rows.reshape(-1, width)[bad[:1]] for who, rows in (("found", found), ("wanted", wanted))}
    assert not bad.size, f"{name}: {bad.size} blocks differ, first {bad[0]}: {first}"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_libggmls(name, distribution, scale, libggml):
    rows = (distribution(np.random.default_rng(0)) * scale).astype(np.float32)
    assert_same_blocks(name, quantize(name, rows), libggml.quantize(ggml_type(name), rows))


# The package differs from libggml, and so from us, in blocks of zeros (sign of the scale), where the inverse of the
# scale overflows (undefined in C) and in the sign of a minimum of zero. Dense values of common size have none of these.
@pytest.mark.parametrize("scale", [1e-8, 1e-5, 0.02, 1.0, 300.0])
@pytest.mark.parametrize("distribution", [normal, heavy_tailed, with_ties])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_the_gguf_packages(name, distribution, scale):
    rows = (distribution(np.random.default_rng(1)) * scale).astype(np.float32)
    assert_same_blocks(name, quantize(name, rows), by_gguf(name, rows))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_are_libggmls_and_the_gguf_packages(name, libggml):
    rows = (heavy_tailed(np.random.default_rng(2)) * 0.02).astype(np.float32)
    found = quantize(name, rows)
    assert_same_blocks(name, found, by_gguf(name, rows))
    assert_same_blocks(name, found, libggml.quantize(ggml_type(name), rows))

    np.float32(4e5)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-45, -1e-45, 1.1754944e-38, 2.0**-125, -(2.0**-126), 2.0**-14]
FLOATS = st.one_of(
    st.floats(-60000, 60000, width=32),
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**-120), 2.0**-120, width=32),
    st.sampled_from(SPECIAL),
)
# Few different magnitudes per block make ties likely.
BLOCKS = st.one_of(
    st.lists(FLOATS, min_size=32, max_size=32),
    st.lists(FLOATS, min_size=1, max_size=3).flatmap(
        lambda few: st.lists(st.sampled_from([*few, *(-number for number in few)]), min_size=32, max_size=32)
    ),
)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_any_block_is_libggmls(name, libggml):
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(BLOCKS)
    def check(numbers):
        rows = np.array([numbers], np.float32)
        assert quantize(name, rows).tobytes() == libggml.quantize(ggml_type(name), rows).tobytes()

    check()


RAMP = np.arange(32, dtype=np.float32)
GOLDEN = {
    # 1.0 is 3C00, little-endian 00 3C; codes are the values.
    "Q8_0": (np.where(RAMP == 31, -127, RAMP), "003c" + "".join(f"{code:02x}" for code in range(31)) + "81"),
    # Peak -8 gives scale 1; weight j is j - 8, weight j + 16 is 7 - j: codes j and 15 - j.
    "Q4_0": (np.where(RAMP < 16, RAMP - 8, 23 - RAMP), "003c" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"),
    # Scale 0.5 is 3800, minimum 2 is 4000; the same codes.
    "Q4_1": (np.where(RAMP < 16, RAMP, 31 - RAMP) / 2 + 2, "0038" + "0040" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"),
    # Codes 0 to 31: the last sixteen have the fifth bit.
    "Q5_0": (RAMP - 16, "003c" + "0000ffff" + "00112233445566778899aabbccddeeff"),
    # Scale 1, minimum -3 is C200.
    "Q5_1": (RAMP - 3, "003c" + "00c2" + "0000ffff" + "00112233445566778899aabbccddeeff"),
}


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_block_worked_out_by_hand(name):
    values, wanted = GOLDEN[name]
    assert quantize(name, values.astype(np.float32)[None]).tobytes().hex() == wanted


def test_q8_0_rounds_halves_away_from_zero_and_what_is_just_below_to_nearest():
    below = np.nextafter(np.float32(0.5), np.float32(0))
    values = np.zeros((1, 32), np.float32)
    values[0, :9] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, below, -below]
    assert quantize("Q8_0", values)[0, 2:11].view(np.int8).tolist() == [127, 1, 2, 3, -1, -2, -3, 0, 0]


@pytest.mark.parametrize(("first", "scale"), [(1, -0.125), (-1, 0.125)])
def test_of_two_equal_peaks_the_first_gives_the_sign(first, scale):
    values = np.full((1, 32), 0.25, np.float32)
    values[0, [5, 9]] = first, -first
    assert quantize("Q4_0", values)[0, :2].view(np.float16)[0] == scale


# One weight that makes scale or minimum 65520, where rounding to float16 becomes infinite, and the last that fits.
@pytest.mark.parametrize(
    ("name", "too_large"),
    [("Q8_0", 65520 * 127), ("Q4_0", 65520 * 8), ("Q5_0", 65520 * 16), ("Q4_1", 65520 * 15), ("Q5_1", 65520 * 31)],
)
def test_a_scale_beyond_float16_is_refused_and_the_largest_one_is_not(name, too_large, libggml):
    rows = np.zeros((3, 64), np.float32)
    rows[1, 40] = too_large
    with pytest.raises(LayoutError, match=f"{name} .* 1 of 6 blocks .*BF16"):
        quantize(name, rows)
    rows[1, 40] = np.nextafter(np.float32(too_large), np.float32(0))
    assert_same_blocks(name, quantize(name, rows), libggml.quantize(ggml_type(name), rows))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_a_minimum_beyond_float16_is_refused(name):
    rows = np.full((1, 32), -65520, np.float32)
    with pytest.raises(LayoutError, match="1 of 1 blocks"):
        quantize(name, rows)
    rows[0, 3] = 3e6  # scale and minimum of the same block
    with pytest.raises(LayoutError, match="1 of 1 blocks"):
        quantize(name, rows)


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_nonfinite_weights_never_become_a_block(name, wild):
    rows = np.ones((4, 32), np.float32)
    rows[2, 7] = wild
    with pytest.raises(LayoutError, match="of 4 blocks"):
        quantize(name, rows)


@pytest.mark.parametrize("source", [np.float32, BFLOAT16, np.float64])
def test_f16_refuses_finite_values_beyond_it_and_counts_them(source):
    rows = np.ones((2, 40), source)
    rows[0, :3] = 70000, -1e30, 2
    with pytest.raises(LayoutError, match=r"2 of 80 values .*BF16"):
        quantize_rows("F16", rows)
    rows[0, :2] = np.inf, -np.inf  # allowed here: --allow-nonfinite passes them on
    assert np.isinf(quantize_rows("F16", rows).view(np.float16)[0, :2]).all()


@pytest.mark.parametrize("source", [BFLOAT16, np.float16, np.float64, ">f4", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ALL_TYPES)
def test_every_storage_type_gives_the_blocks_of_its_float32_values(name, source):
    rows = np.random.default_rng(4).standard_normal((40, 64)).astype(np.float32)
    stored = rows.astype(source)
    single = np.ascontiguousarray(stored.astype(np.float32))
    wanted = quantize(name, single)
    np.testing.assert_array_equal(quantize_rows(name, stored), wanted)
    np.testing.assert_array_equal(quantize_rows(name, np.asfortranarray(stored)), wanted)


@pytest.mark.parametrize("name", ALL_TYPES)
def test_shapes_are_kept_and_only_the_last_axis_shrinks(name):
    experts = np.random.default_rng(5).standard_normal((3, 5, 96)).astype(BFLOAT16)
    found = quantize_rows(name, experts)
    assert found.shape == (3, 5, row_bytes(ggml_type(name), 96))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[1], quantize_rows(name, experts[1]))
    np.testing.assert_array_equal(found[2, 4], quantize_rows(name, experts[2, 4]))
    assert quantize_rows(name, experts[:, :0]).shape == (3, 0, found.shape[2])


@pytest.mark.parametrize("blocks", [1, 2, CHUNK // 32 - 1, CHUNK // 32, CHUNK // 32 + 1, 2 * CHUNK // 32 + 37])
@pytest.mark.parametrize("source", [np.float32, BFLOAT16])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_no_byte_comes_from_memory_that_was_not_written(name, source, blocks, libggml, monkeypatch):
    rows = np.random.default_rng(blocks).standard_normal((blocks, 32)).astype(source)
    rows[::5] = 0
    wanted = libggml.quantize(ggml_type(name), rows.astype(np.float32))
    before = rows.tobytes()
    fresh = np.empty

    def poisoned(shape, dtype=float, **options):
        array = fresh(shape, dtype, **options)
        array.view(np.uint8)[...] = 0xFF  # NaN in every float type
        return array

    monkeypatch.setattr(np, "empty", poisoned)
    assert_same_blocks(name, quantize_rows(name, rows), wanted)
    assert rows.tobytes() == before


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_read_only_unaligned_array_is_quantized(name):
    rows = np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32)
    unaligned = np.frombuffer(b"\0" + rows.tobytes(), np.uint8)[1:].view(np.float32).reshape(rows.shape)
    assert not unaligned.flags.aligned
    assert not unaligned.flags.writeable
    np.testing.assert_array_equal(quantize(name, unaligned), quantize(name, rows))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_threads_do_not_disturb_each_other(name):
    parts = [np.random.default_rng(seed).standard_normal((300, 256)).astype(BFLOAT16) for seed in range(6)]
    alone = [quantize_rows(name, part) for part in parts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda part: quantize_rows(name, part), parts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_quantized_is_refused():
    rows = np.ones((2, 341), np.float32)
    with pytest.raises(LayoutError, match=r"Q8_0 .*32.*341"):
        quantize("Q8_0", rows)
    with pytest.raises(LayoutError, match="no quantizer for IQ1_S"):
        quantize("IQ1_S", np.ones((1, 256), np.float32))
    with pytest.raises(LayoutError, match="float32 rows wanted, got float64"):
        quantize("Q8_0", np.ones((1, 32)))
    with pytest.raises(LayoutError, match="scalar"):
        quantize("Q8_0", np.float32(1).reshape(()))
    with pytest.raises(InputError, match="not a real number type"):
        quantize_rows("Q8_0", np.ones((1, 32), complex))
    with pytest.raises(InputError, match="unknown ggml type"):
        quantize("Q9_0", np.ones((1, 32), np.float32))
