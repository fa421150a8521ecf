"""Ranges of the inputs of linears, for integer products whose inputs are rounded to a grid that is fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.site import Site, SiteResult
from quantpress.quant.errors import InputError

__all__ = ["BINS", "RangeMethod", "binned", "central_range", "lost_share"]

BINS = 1 << 16
_STEPS = 255  # of 8 bits
_NEGATIVE = 1 << 15  # bins from here on hold what has a sign


def binned(values: torch.Tensor) -> NDArray[np.int64]:
    """Counts float32 values by the upper half of their bits: sign, exponent and seven bits of the significand.

    Bins are as wide as 2^-7 of what they hold, wherever the values lie, so one pass is enough; and counts add up to
    the same whatever their order.

    Returns:
        (BINS,) int64.
    """
    images = values.float().contiguous().view(torch.int32).flatten()
    counts: NDArray[np.int64] = torch.bincount((images >> 16) & (BINS - 1), minlength=BINS).cpu().numpy()
    return counts


def central_range(counts: NDArray[np.int64], ends: NDArray[np.float32], percentile: float) -> tuple[float, float]:
    """Gives a range that holds at least so many percent of the values, as many being left out below it as above.

    Args:
        counts: (BINS,) of `binned`.
        ends: (2,) least and greatest value, which the range does not exceed.
        percentile: in (0, 100].

    Returns:
        Least and greatest value of the range, which are ends of bins.
    """
    order = np.concatenate([np.arange(BINS - 1, _NEGATIVE - 1, -1), np.arange(_NEGATIVE)])  # from least to greatest
    cut = int(counts.sum()) * (1 - percentile / 100) / 2
    sorted_counts = counts[order]
    low = order[np.searchsorted(np.cumsum(sorted_counts), cut, side="right")]
    high = order[::-1][np.searchsorted(np.cumsum(sorted_counts[::-1]), cut, side="right")]
    # whole bins: where a bin decides, all that was counted in it is inside
    least = max(_end(int(low), far=bool(low >= _NEGATIVE)), float(ends[0]))
    greatest = min(_end(int(high), far=bool(high < _NEGATIVE)), float(ends[1]))
    return least, greatest


def _end(bin_: int, *, far: bool) -> float:
    """Gives the number of a bin that is nearest to 0, or the one that is farthest from it."""
    image = np.array(bin_ << 16 | (0xFFFF if far else 0), np.uint32)
    return float(image.view(np.float32))


def lost_share(counts: NDArray[np.int64], low: float, high: float) -> float:
    """Gives the share of the values other than 0 that a grid of 8 bits for a range, widened to hold 0, rounds to 0.

    Bins that are lost in part count as not lost.
    """
    half = (max(high, 0.0) - min(low, 0.0)) / _STEPS / 2
    sizes = counts[1:_NEGATIVE] + counts[_NEGATIVE + 1 :]  # without 0 itself
    with np.errstate(invalid="ignore"):  # bins of NaN
        ends = ((np.arange(1, _NEGATIVE, dtype=np.uint32) << 16) | 0xFFFF).view(np.float32)
    total = int(sizes.sum())
    return int(sizes[ends < half].sum()) / total if total else 0.0


@dataclass(slots=True)
class RangeMethod:
    """Changes nothing and notes the range of every linear's input; a `LayerMethod`.

    Attributes:
        percentile: None for the least and the greatest value; else percent of the values that the range must hold.
        found: (slot, layer) -> least and greatest value.
        lost: (slot, layer) -> share of the values that the range of all of them would round to 0.
    """

    percentile: float | None = None
    found: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    lost: dict[tuple[str, int], float] = field(default_factory=dict)
    sequential: bool = field(default=False, init=False)
    wants: frozenset[str] = field(default=frozenset({"ends", "counts"}), init=False)

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, NDArray[Any]]) -> SiteResult:
        """Notes the ranges of a layer; experts that no token reached have none.

        Raises:
            InputError: statistics that were not gathered.
        """
        del plain
        for site in sites:
            if not site.tokens:
                continue
            if site.ends is None or site.counts is None:
                raise InputError("ranges need the least and the greatest input, and counts")
            least, greatest = float(site.ends[0]), float(site.ends[1])
            if self.percentile is not None:
                least, greatest = central_range(site.counts, site.ends, self.percentile)
            # by all values: what a percentile cuts off may matter most (the first tokens of many models)
            lost = lost_share(site.counts, float(site.ends[0]), float(site.ends[1]))
            keys = [(slot, site.layer) for slot in site.weights]
            self.found |= dict.fromkeys(keys, (least, greatest))
            self.lost |= dict.fromkeys(keys, lost)
        return SiteResult({})
