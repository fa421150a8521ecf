"""How a window of a text becomes a question and an answer for an encoder-decoder.

The encoder reads the window's first part. The decoder begins with its start token, in the place of the last token that
the encoder has read, and is given the rest: so each position predicts the same token of the window as a decoder alone
would, and everything that judges windows judges these models too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["split_window"]


def split_window(tokens: NDArray[np.int32], first: int, start: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Gives what the encoder and the decoder read.

    Args:
        tokens: (n,) int32 ids of a window.
        first: position from which on the tokens that follow are predicted, 0 <= first < n.
        start: token that the decoder begins with.

    Returns:
        (first + 1,) and (n - first,) int32. The decoder's output at place r predicts `tokens[first + r + 1]`.
    """
    answer = np.concatenate([np.array([start], np.int32), tokens[first + 1 :].astype(np.int32)])
    return tokens[: first + 1].astype(np.int32), answer
