"""Corners of codes in words, and of the values they stand for, against whole numbers of any length and float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.quant.errors import LayoutError
from quantpress.quant.grid import SCALE_TYPES
from quantpress.quant.packing import pack_stream, pack_words, unpack_stream, unpack_words
from quantpress.quant.qtensor import BITS, QuantizedTensor


def _as_bits(codes: np.ndarray, bits: int, stream: bool) -> list[int]:
    """The words of one row, by whole numbers of any length."""
    per_word = 32 // bits
    if stream:
        number = sum(int(code) << (bits * place) for place, code in enumerate(codes))
        return [(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(codes) * bits // 32)]
    parts = [codes[start : start + per_word] for start in range(0, len(codes), per_word)]
    return [sum(int(code) << (bits * place) for place, code in enumerate(part)) for part in parts]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), leading=st.sampled_from([(), (1,), (3,), (0,), (2, 2)]))
def test_words_hold_the_bits_that_whole_numbers_say(data: st.DataObject, bits: int, leading: tuple[int, ...]) -> None:
    count = data.draw(st.integers(0, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = rng.integers(0, 1 << bits, (*leading, count)).astype(np.uint8)
    if len(leading) == 1:
        codes = np.asfortranarray(codes)  # as a transposed matrix comes
    for stream, pack, unpack in ((False, pack_words, unpack_words), (True, pack_stream, unpack_stream)):
        if stream and count * bits % 32:
            with pytest.raises(LayoutError, match="do not fill"):
                pack(codes, bits)
            continue
        words = pack(codes, bits)
        assert words.dtype == np.int32
        for place in np.ndindex(*leading):
            assert words[place].view(np.uint32).tolist() == _as_bits(codes[place], bits, stream)
        assert (unpack(words, bits, count) == codes).all()
        assert unpack(words, bits, count).shape == codes.shape
        with pytest.raises(LayoutError):
            unpack(words, bits, words.shape[-1] * (32 // bits if bits != 3 or not stream else 32) + 1)


@pytest.mark.parametrize("bits", BITS)
def test_a_stream_that_holds_another_number_of_codes_is_refused(bits: int) -> None:
    words = pack_stream(np.zeros((2, 64), np.uint8), bits)
    for count in (63, 65):
        with pytest.raises(LayoutError):
            unpack_stream(words, bits, count)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), scale_type=st.sampled_from(sorted(SCALE_TYPES)), bits=st.sampled_from(BITS))
def test_values_are_the_formula_in_float64_rounded_once_for_every_scale(
    data: st.DataObject, scale_type: str, bits: int
) -> None:
    dtype, rng = SCALE_TYPES[scale_type], np.random.default_rng(data.draw(st.integers(0, 99)))
    columns, size = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 7, 16, 64]))
    groups = -(-columns // size)
    exponents = rng.integers(-24, 15, (3, groups)) if scale_type == "F16" else rng.integers(-149, 118, (3, groups))
    scale = np.ldexp(rng.choice([-1.0, 1.0, 1.5, 0.0], (3, groups)), exponents).astype(dtype)
    codes, zero = rng.integers(0, 1 << bits, (3, columns), np.uint8), rng.integers(0, 1 << bits, (3, groups), np.uint8)
    g_idx = rng.integers(0, groups, columns).astype(np.int32) if data.draw(st.booleans()) else None
    own = np.arange(columns) // size if g_idx is None else g_idx
    wanted = scale.astype(np.float64)[:, own] * (codes.astype(np.float64) - zero[:, own])
    found = QuantizedTensor(codes, scale, zero, bits, size, g_idx).dequantize()
    assert (found == wanted.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8, ml_dtypes.float8_e4m3fn])
def test_scales_of_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(LayoutError, match="scale"):
        QuantizedTensor(np.zeros((1, 4), np.uint8), np.ones((1, 1), dtype), None, 4, 4)
