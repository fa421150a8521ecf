"""The texts on which encoders are judged: windows of a text with some of their tokens masked, and texts for vectors.

Of a window's second half every token is predicted, a quarter of them at a time: the others are there to be looked at,
and about one in eight tokens of the window is masked, as when such models are trained (arXiv 1810.04805: 15 %).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.tokenizer import Tokenizer
from quantpress.quant.errors import InputError, UsageError

__all__ = ["DEFAULT_CHUNKS", "DEFAULT_CONTEXT", "PASSES", "encoder_windows", "gathered", "masked", "texts_of"]

DEFAULT_CONTEXT = 128
"""Tokens of a window: most texts that are embedded are shorter, and each window is run `PASSES` times."""

DEFAULT_CHUNKS = 24

PASSES = 4
"""How often a window is run with another quarter of its second half masked."""

Tokens = NDArray[np.int32]


def encoder_windows(tokenizer: Tokenizer, text: str, *, context: int, chunks: int) -> list[Tokens]:
    """Cuts a text into windows that begin and end as the tokenizer's texts do: `[CLS] ... [SEP]`.

    Args:
        tokenizer: the checkpoint's own.
        text: what to cut.
        context: tokens of each window, with those two.
        chunks: how many windows at most.

    Raises:
        UsageError: the windows are too short.
        InputError: the text is too short for one window.
    """
    if context < 8:
        raise UsageError(f"--context {context}: wanted at least 8 tokens")
    first, last = _around(tokenizer)
    ids = tokenizer.encode(text, special=False)
    inner = context - len(first) - len(last)
    found = [ids[start : start + inner] for start in range(0, len(ids) - inner + 1, inner)][:chunks]
    if not found:
        raise InputError(f"the text has {len(ids)} tokens, wanted at least {inner}; use a longer text")
    return [np.concatenate([first, part, last]).astype(np.int32) for part in found]


def _around(tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
    """Gives the ids that the tokenizer puts before and after a text."""
    whole, inner = tokenizer.encode_in_template("a"), tokenizer.encode("a", special=False).tolist()
    start = next((at for at in range(len(whole)) if whole[at : at + len(inner)] == inner), 0)
    return np.array(whole[:start], np.int32), np.array(whole[start + len(inner) :], np.int32)


def masked(window: Tokens, first: int, mask: int) -> list[Tokens]:
    """Gives the `PASSES` forms of a window, whose hidden states `gathered` puts together.

    Args:
        window: (n,) int32.
        first: tokens behind this position are predicted; the last one, which ends the text, is never masked.
        mask: id of the mask.
    """
    places = np.arange(len(window))
    behind = (places > first) & (places < len(window) - 1)
    return [np.where(behind & (places % PASSES == each), np.int32(mask), window) for each in range(PASSES)]


def gathered(states: Sequence[NDArray[np.float32]], first: int) -> NDArray[np.float32]:
    """Takes each token's hidden state from the pass in which it was masked.

    Args:
        states: (n, hidden) of each of the `masked` forms.
        first: as for `masked`.

    Returns:
        (n - first, hidden): row r belongs to position first + 1 + r, as `Runtime.logits` has it; the last row is not
        of use.
    """
    count = len(states[0])
    places = [*range(first + 1, count), count - 1]
    return np.stack([states[place % PASSES][place] for place in places])


def texts_of(windows: Sequence[Tokens]) -> list[Tokens]:
    """Gives texts to make vectors of: the windows, most of them cut to an eighth, a quarter or half of their length."""
    texts = []
    for number, window in enumerate(windows):
        length = max(8, len(window) >> (3 - number % 4))
        texts.append(np.concatenate([window[: length - 1], window[-1:]]))
    return texts
