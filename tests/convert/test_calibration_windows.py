"""Windows of a calibration text."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.convert.calibration.windows import calibration_windows, overlap_note, windows_sha256
from quantpress.quant.errors import InputError, UsageError


@given(
    length=st.integers(2, 40), samples=st.integers(1, 12), spare=st.integers(0, 200), seed=st.integers(0, 99),
    bos=st.booleans(),
)  # fmt: skip
def test_windows_do_not_overlap_where_the_text_is_long_enough(
    length: int, samples: int, spare: int, seed: int, bos: bool
) -> None:
    taken = length - bos
    text = np.arange(1, samples * taken + spare + 1)
    windows = calibration_windows(text, samples=samples, length=length, seed=seed, bos=0 if bos else None)
    assert [window.dtype for window in windows] == [np.dtype(np.int32)] * samples
    assert {len(window) for window in windows} == {length}
    kept = [window[1:] if bos else window for window in windows]
    assert not bos or all(window[0] == 0 for window in windows)
    assert all((np.diff(window) == 1).all() for window in kept)
    assert len(np.unique(np.concatenate(kept))) == samples * taken
    assert overlap_note(len(text), samples=samples, length=length, bos=bos) is None


@given(length=st.integers(2, 40), samples=st.integers(2, 12), short=st.integers(1, 400))
def test_windows_of_a_short_text_cover_all_of_it(length: int, samples: int, short: int) -> None:
    size = max(length, samples * length - short)
    windows = calibration_windows(np.arange(size), samples=samples, length=length)
    assert len(np.unique(np.concatenate(windows))) == size
    note = overlap_note(size, samples=samples, length=length)
    assert note is not None
    assert f"has {size} tokens" in note
    assert f"need {samples * length}" in note


def test_the_seed_chooses_the_windows_and_their_order() -> None:
    text = np.arange(10_000)
    first, again, other = (calibration_windows(text, samples=8, length=32, seed=seed) for seed in (3, 3, 4))
    assert windows_sha256(first) == windows_sha256(again) != windows_sha256(other)
    starts = [int(window[0]) for window in first]
    assert starts != sorted(starts)
    # numpy promises these raw numbers for ever; and the places follow from them so
    order, gaps = np.random.PCG64(3).random_raw(16).reshape(2, 8).tolist()
    wanted = sorted(gap % (10_000 - 8 * 32 + 1) for gap in gaps)
    by_rank = sorted(range(8), key=order.__getitem__)
    assert starts == [wanted[number] + 32 * number for number in by_rank]
    assert starts == [1312, 4260, 9928, 1864, 6391, 6599, 3125, 2464]


def test_the_hash_is_that_of_the_little_endian_ids() -> None:
    windows = [np.array([1, 2], np.int32), np.array([3, 70000], np.int32)]
    wanted = hashlib.sha256(bytes.fromhex("01000000 02000000 03000000 70110100")).hexdigest()
    assert windows_sha256(windows) == wanted


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(InputError, match="has 9 tokens, wanted at least 10"):
        calibration_windows(range(9), samples=1, length=10)
    assert len(calibration_windows(range(9), samples=1, length=10, bos=1)[0]) == 10
    for samples, length in ((0, 10), (1, 1)):
        with pytest.raises(UsageError, match="wanted at least 1 sample of 2 tokens"):
            calibration_windows(range(99), samples=samples, length=length)
