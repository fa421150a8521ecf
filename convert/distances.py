"""Distances between tokens as T5 tells them apart (arXiv 1910.10683, section 2.1)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["bucket_of"]


def bucket_of(
    distances: npt.NDArray[np.int64], *, both_ways: bool, buckets: int, furthest: int
) -> npt.NDArray[np.int64]:
    """Gives the bucket of each distance: one for each short distance, then ever wider ones up to `furthest`.

    The logarithm is of float32, as in transformers (models/t5/modeling_t5.py, _relative_position_bucket): in another
    precision some distances fall into the bucket beside.

    Args:
        distances: position that is looked at minus position that looks, any shape.
        both_ways: half of the buckets are for tokens behind (an encoder); else all those behind are one.
        buckets: number of buckets.
        furthest: distances from here on are one.
    """
    count = buckets // 2 if both_ways else buckets
    short = count // 2
    far = np.abs(distances) if both_ways else np.maximum(-distances, 0)
    share = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(short)) / np.float32(math.log(furthest / short))
    wide = np.minimum(short + (np.maximum(share, 0) * np.float32(count - short)).astype(np.int64), count - 1)
    found = np.where(far < short, far, wide)
    return np.where(both_ways & (distances > 0), found + count, found)
