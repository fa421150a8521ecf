"""Byte layouts of the blocks with 32 weights, as numpy records (layouts: ggml-common.h, block_q4_0 and its family).

Codes of 4 bits: byte j holds weight j in its low half and weight j + 16 in its high half. `high` is a mask of 32 bits,
bit j being the fifth bit of weight j. The codes are opaque bytes ("V16") because numpy copies those fastest.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

__all__ = ["BLOCK", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]

BLOCK: Final = 32  # weights per block in every layout here

_SCALE = ("scale", "<f2")  # step between two codes
_MINIMUM = ("minimum", "<f2")  # value of code 0
_HIGH = ("high", "<u4")
_NIBBLES = ("codes", "V16")

Q4_0: Final[np.dtype[Any]] = np.dtype([_SCALE, _NIBBLES])
Q4_1: Final[np.dtype[Any]] = np.dtype([_SCALE, _MINIMUM, _NIBBLES])
Q5_0: Final[np.dtype[Any]] = np.dtype([_SCALE, _HIGH, _NIBBLES])
Q5_1: Final[np.dtype[Any]] = np.dtype([_SCALE, _MINIMUM, _HIGH, _NIBBLES])
Q8_0: Final[np.dtype[Any]] = np.dtype([_SCALE, ("codes", "V32")])
