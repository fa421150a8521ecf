"""Packed codes against integers of any size: a row of words is one number whose digits are the codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.quant.errors import LayoutError
from quantpress.quant.packing import pack_stream, pack_words, unpack_stream, unpack_words
from quantpress.quant.qtensor import BITS


def _codes(rows: int, count: int, bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), np.uint8)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 5), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_a_stream_is_one_number_in_little_endian_bytes(rows: int, blocks: int, bits: int, seed: int) -> None:
    codes = _codes(rows, 32 * blocks, bits, seed)
    words = pack_stream(codes, bits)
    assert words.dtype == np.int32
    for row, packed in zip(codes, words, strict=True):
        assert int.from_bytes(packed.tobytes(), "little") == sum(
            int(code) << (bits * at) for at, code in enumerate(row)
        )
    assert (unpack_stream(words, bits, codes.shape[1]) == codes).all()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), count=st.integers(1, 90), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_words_hold_whole_codes_and_zeros_behind_them(rows: int, count: int, bits: int, seed: int) -> None:
    codes, each = _codes(rows, count, bits, seed), 32 // bits
    words = pack_words(codes, bits)
    for row, packed in zip(codes, words.view(np.uint32), strict=True):
        for number, word in enumerate(packed):
            part = row[number * each : (number + 1) * each]
            assert int(word) == sum(int(code) << (bits * at) for at, code in enumerate(part))
    assert (unpack_words(words, bits, count) == codes).all()


def test_codes_that_do_not_fill_words_and_words_that_hold_too_few_are_refused() -> None:
    with pytest.raises(LayoutError, match="do not fill whole"):
        pack_stream(_codes(1, 33, 3, 0), 3)
    with pytest.raises(LayoutError, match="8 codes, 9 are wanted"):
        unpack_words(np.zeros((1, 1), np.int32), 4, 9)
    with pytest.raises(LayoutError, match="not 31"):
        unpack_stream(np.zeros((1, 3), np.int32), 3, 31)
