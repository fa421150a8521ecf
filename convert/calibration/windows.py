"""Windows of a calibration text, chosen by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import InputError, UsageError

__all__ = ["calibration_windows", "enough_tokens", "enough_windows", "overlap_note", "windows_sha256"]

_TOKENS = 4096  # for gradients: a trained model of width 256 gained as much from 1024 as from 32768
_PER_COLUMN = 2  # tokens at least per column of the embedding
_LENGTH = 512  # of a window, at most: a layer's activations for one are held by each thread


def calibration_windows(
    token_ids: Sequence[int] | NDArray[np.integer], *, samples: int, length: int, seed: int = 0, bos: int | None = None
) -> list[NDArray[np.int32]]:
    """Cuts windows at random places of a text, as Frantar et al. calibrate GPTQ (arXiv 2210.17323, section 4).

    Windows do not overlap where the text is long enough; in a shorter one they are spread evenly, so that they
    overlap as little as they can and cover all of it (`overlap_note` says so). The same text, numbers and seed give
    the same windows with every version of numpy.

    Args:
        token_ids: (n,) ids of the whole text, without special tokens.
        samples: number of windows.
        length: tokens of a window.
        seed: chooses the places and the order.
        bos: id that stands before the text of each window and counts as one of its tokens; None for none.

    Returns:
        `samples` windows of (length,) int32.

    Raises:
        UsageError: a number that is too small.
        InputError: the text is shorter than one window.
    """
    if samples < 1 or length < 2:
        raise UsageError(f"{samples} samples of {length} tokens: wanted at least 1 sample of 2 tokens")
    tokens = np.asarray(token_ids).astype(np.int32)
    taken = length if bos is None else length - 1
    if len(tokens) < taken:
        raise InputError(
            f"the calibration text has {len(tokens)} tokens, wanted at least {taken}; use a longer text or fewer"
            " tokens per window"
        )
    start = np.zeros(0, np.int32) if bos is None else np.full(1, bos, np.int32)
    return [np.concatenate([start, tokens[at : at + taken]]) for at in _starts(len(tokens), samples, taken, seed)]


def overlap_note(tokens: int, *, samples: int, length: int, bos: bool = False) -> str | None:
    """Says that a text of so many tokens is too short for windows that do not overlap; None if it is not."""
    taken = length - bos
    if tokens >= samples * taken:
        return None
    return (
        f"the calibration text has {tokens} tokens, {samples} windows of {taken} need {samples * taken}: they overlap"
    )


def windows_sha256(windows: Sequence[NDArray[np.int32]]) -> str:
    """Gives the hash of all token ids, as little-endian int32 one after another."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.astype("<i4").tobytes())
    return digest.hexdigest()


def _starts(tokens: int, samples: int, taken: int, seed: int) -> NDArray[np.int64]:
    # raw numbers of the generator, for numpy promises to keep only these from version to version
    generator = np.random.PCG64(seed)
    order = np.argsort(generator.random_raw(samples), kind="stable")
    room = tokens - samples * taken
    if room < 0:
        spread = np.arange(samples, dtype=np.int64) * (tokens - taken)
        return spread[order] // max(samples - 1, 1)
    gaps = np.sort((generator.random_raw(samples) % np.uint64(room + 1)).astype(np.int64))
    return (gaps + np.arange(samples, dtype=np.int64) * taken)[order]


def enough_tokens(columns: int) -> int:
    """Gives the tokens that gradients for an embedding of so many columns are measured on."""
    return max(_TOKENS, _PER_COLUMN * columns)


def enough_windows(windows: Sequence[NDArray[np.int32]], columns: int) -> Sequence[NDArray[np.int32]]:
    """Gives the starts of a text's first windows, `enough_tokens` where the text has so many."""
    length = min(_LENGTH, len(windows[0]))
    return [window[:length] for window in windows[: -(-enough_tokens(columns) // length)]]
