"""Statistics of a linear's inputs: Hessian, drift, power, mean and greatest size per column, range of all values.

The Hessian is GPTQ's X^T X; the drift says how the inputs differ from those that the source's weights give.

Sums are taken in the order of the tokens whatever the number of threads: each block of the Hessian adds one slice of
tokens after the other, and only different blocks are worked on at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.ranges import BINS, binned

__all__ = ["Gram", "Measured", "Statistics", "finite", "power_of"]

Submit = Callable[[Callable[[], None]], "Future[None]"]

_BLOCK = 256  # columns of a block; with smaller ones products get slower, with larger ones more is computed twice
_WHOLE = 2048  # columns of a block where nothing is left out
_ALIGN = 16  # floats of a cache line: blocks that begin elsewhere are slower


class Gram:
    """X^T X in float32, of which only the blocks on and above the diagonal are computed; or Y^T X, all of it.

    Slices of bfloat16 give products that are rounded to bfloat16; they are summed in float32.
    """

    def __init__(self, columns: int, device: torch.device, *, symmetric: bool = True) -> None:
        """Makes (K, K) zeros."""
        self._symmetric = symmetric
        count = -(-columns // (_BLOCK if symmetric else _WHOLE))
        width = -(-columns // (count * _ALIGN)) * _ALIGN
        self._blocks = [(low, min(low + width, columns)) for low in range(0, columns, width)]
        self._sum = torch.zeros(columns, columns, device=device)
        self._running: list[Future[None]] = []

    def add(self, left: torch.Tensor, right: torch.Tensor, submit: Submit) -> None:
        """Adds the next slice of tokens, (n, K) twice; waits for the slice before."""
        self.wait()
        self._running = [submit(partial(self._add, left, right, low, high)) for low, high in self._blocks]

    def _add(self, left: torch.Tensor, right: torch.Tensor, low: int, high: int) -> None:
        first = low if self._symmetric else 0
        if left.dtype == torch.float32:
            self._sum[low:high, first:].addmm_(left[:, low:high].T, right[:, first:])
        else:
            self._sum[low:high].add_(left[:, low:high].T.contiguous() @ right)

    def wait(self) -> None:
        """Waits until all that was added is summed."""
        for future in self._running:
            future.result()
        self._running = []

    def finish(self, tokens: int, submit: Submit) -> NDArray[np.float32]:
        """Gives the sum / tokens, (K, K) float32, a symmetric one symmetric bit for bit."""
        self.wait()
        if self._symmetric:
            self._running = [submit(partial(self._mirror, tokens, low, high)) for low, high in self._blocks]
            self.wait()
        else:
            self._sum.div_(tokens)
        result: NDArray[np.float32] = self._sum.cpu().numpy()
        return result

    def _mirror(self, tokens: int, low: int, high: int) -> None:
        self._sum[low:high, low:].div_(tokens)
        self._sum[high:, low:high].copy_(self._sum[low:high, high:].T)
        square = self._sum[low:high, low:high]
        square.copy_(square.triu() + square.triu(1).T)


@dataclass(frozen=True, eq=False, slots=True)
class Measured:
    """What one slice of tokens adds to statistics.

    Its inputs and their drift, (n, K); sums and maxima, (K,); least and greatest value, (2,); counts, (BINS,); sums of
    squares, (K,) float64.
    """

    values: torch.Tensor
    drift: torch.Tensor | None
    total: NDArray[Any] | None
    greatest: NDArray[Any] | None
    ends: NDArray[Any] | None = None
    counts: NDArray[Any] | None = None
    power: NDArray[np.float64] | None = None


class Statistics:
    """What a method wants to know of the inputs of one step."""

    def __init__(self, wants: frozenset[str], columns: int, device: torch.device, *, narrow: bool = False) -> None:
        """Starts from no tokens.

        Args:
            wants: of "hessian", "drift", "mean_abs", "max_abs", "ends", "counts", "power".
            columns: K.
            device: for the sums.
            narrow: compute the drift's products in bfloat16: it is a small correction, and nothing inverts it.
        """
        self._narrow = narrow
        self._gram = Gram(columns, device) if "hessian" in wants else None
        self._drift = Gram(columns, device, symmetric=False) if "drift" in wants else None
        self._sum = np.zeros(columns) if "mean_abs" in wants else None
        self._greatest = np.zeros(columns, np.float32) if "max_abs" in wants else None
        self._ends = np.array([np.inf, -np.inf], np.float32) if "ends" in wants else None
        self._counts = np.zeros(BINS, np.int64) if "counts" in wants else None
        self._power = np.zeros(columns) if "power" in wants else None
        self.tokens = 0

    def measure(self, values: torch.Tensor, source: torch.Tensor | None = None) -> Measured:
        """Measures a slice; for any thread. `add` takes what it gives, in the order of the slices.

        Args:
            values: (n, K) the inputs.
            source: (n, K) what they are with the source's weights; only for "drift".
        """
        drift = None if self._drift is None or source is None else source - values
        sizes = values.abs() if self._sum is not None or self._greatest is not None else values
        total = None if self._sum is None else sizes.sum(0).cpu().numpy()
        greatest = None if self._greatest is None else sizes.amax(0).cpu().numpy()
        ends = None if self._ends is None else torch.stack(values.aminmax()).cpu().numpy()
        counts = None if self._counts is None else binned(values)
        power = None if self._power is None else power_of(values)
        return Measured(values, drift, total, greatest, ends, counts, power)

    def add(self, slice_: Measured, submit: Submit) -> None:
        """Adds the next slice."""
        self.tokens += len(slice_.values)
        if self._gram is not None:
            self._gram.add(slice_.values, slice_.values, submit)
        if self._drift is not None and slice_.drift is not None:
            kind = torch.bfloat16 if self._narrow else torch.float32
            self._drift.add(slice_.drift.to(kind), slice_.values.to(kind), submit)
        if self._sum is not None and slice_.total is not None:
            self._sum += slice_.total
        if self._greatest is not None and slice_.greatest is not None:
            self._greatest = np.maximum(self._greatest, slice_.greatest)  # keeps NaN
        if self._ends is not None and slice_.ends is not None:
            least, greatest = slice_.ends
            self._ends = np.array([np.minimum(self._ends[0], least), np.maximum(self._ends[1], greatest)], np.float32)
        if self._counts is not None and slice_.counts is not None:
            self._counts += slice_.counts
        if self._power is not None and slice_.power is not None:
            self._power += slice_.power

    def wait(self) -> None:
        """Waits until all that was added is summed."""
        for gram in (self._gram, self._drift):
            if gram is not None:
                gram.wait()

    def finish(self, submit: Submit) -> dict[str, NDArray[Any]]:
        """Gives the fields of a `Site` that were wanted: counts as int64, power as float64, all others as float32.

        Means over no token at all are left out, and so are ends.
        """
        found: dict[str, NDArray[Any]] = {}
        if self._gram is not None and self.tokens:
            found["hessian"] = self._gram.finish(self.tokens, submit)
        if self._drift is not None and self.tokens:
            found["drift"] = self._drift.finish(self.tokens, submit)
        if self._sum is not None and self.tokens:
            found["mean_abs"] = (self._sum / self.tokens).astype(np.float32)
        if self._greatest is not None:
            found["max_abs"] = self._greatest
        if self._ends is not None and self.tokens:
            found["ends"] = self._ends
        if self._counts is not None:
            found["counts"] = self._counts
        if self._power is not None:
            found["power"] = self._power
        return found


def power_of(values: torch.Tensor) -> NDArray[np.float64]:
    """Gives the sum of squares of each column of (n, K), (K,) float64; the squares are rounded to float32."""
    power: NDArray[np.float64] = values.square().sum(0, dtype=torch.float64).cpu().numpy()
    return power


def finite(found: dict[str, NDArray[Any]]) -> bool:
    """Whether the inputs behind statistics were finite: a NaN or an infinity in a column reaches the column's own."""
    return all(bool(np.isfinite(part.diagonal() if part.ndim == 2 else part).all()) for part in found.values())
