"""Statistics of a linear's inputs: the Hessian X^T X of GPTQ, and mean and maximum of the absolute values per column.

Sums are taken in the order of the tokens whatever the number of threads: each block of the Hessian adds one slice of
tokens after the other, and only different blocks are worked on at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Gram", "Statistics", "finite"]

Submit = Callable[[Callable[[], None]], "Future[None]"]

_BLOCK = 256  # columns of a block; with smaller ones products get slower, with larger ones more is computed twice
_ALIGN = 16  # floats of a cache line: blocks that begin elsewhere are slower


class Gram:
    """X^T X, of which only the blocks on and above the diagonal are computed, all in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        """Makes (K, K) zeros."""
        count = -(-columns // _BLOCK)
        width = -(-columns // (count * _ALIGN)) * _ALIGN
        self._blocks = [(low, min(low + width, columns)) for low in range(0, columns, width)]
        self._sum = torch.zeros(columns, columns, device=device)
        self._running: list[Future[None]] = []

    def add(self, values: torch.Tensor, submit: Submit) -> None:
        """Adds the next slice of tokens, (n, K); waits for the slice before."""
        self.wait()
        self._running = [submit(partial(self._add, values, low, high)) for low, high in self._blocks]

    def _add(self, values: torch.Tensor, low: int, high: int) -> None:
        self._sum[low:high, low:].addmm_(values[:, low:high].T, values[:, low:])

    def wait(self) -> None:
        """Waits until all that was added is summed."""
        for future in self._running:
            future.result()
        self._running = []

    def finish(self, tokens: int, submit: Submit) -> NDArray[np.float32]:
        """Gives X^T X / tokens, (K, K) float32, symmetric bit for bit."""
        self.wait()
        self._running = [submit(partial(self._mirror, tokens, low, high)) for low, high in self._blocks]
        self.wait()
        result: NDArray[np.float32] = self._sum.cpu().numpy()
        return result

    def _mirror(self, tokens: int, low: int, high: int) -> None:
        self._sum[low:high, low:].div_(tokens)
        self._sum[high:, low:high].copy_(self._sum[low:high, high:].T)
        square = self._sum[low:high, low:high]
        square.copy_(square.triu() + square.triu(1).T)


class Statistics:
    """What a method wants to know of the inputs of one step."""

    def __init__(self, wants: frozenset[str], columns: int, device: torch.device) -> None:
        """Starts from no tokens; `wants` is of "hessian", "mean_abs", "max_abs"."""
        self._gram = Gram(columns, device) if "hessian" in wants else None
        self._sum = np.zeros(columns) if "mean_abs" in wants else None
        self._greatest = np.zeros(columns, np.float32) if "max_abs" in wants else None
        self.tokens = 0

    def measure(self, values: torch.Tensor) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
        """Measures a slice, (n, K); for any thread. `add` takes what it gives, in the order of the slices."""
        if self._sum is None and self._greatest is None:
            return None, None
        sizes = values.abs()
        total = None if self._sum is None else sizes.sum(0).cpu().numpy()
        return total, None if self._greatest is None else sizes.amax(0).cpu().numpy()

    def add(
        self, values: torch.Tensor, measured: tuple[NDArray[Any] | None, NDArray[Any] | None], submit: Submit
    ) -> None:
        """Adds the next slice."""
        self.tokens += len(values)
        if self._gram is not None:
            self._gram.add(values, submit)
        total, greatest = measured
        if self._sum is not None and total is not None:
            self._sum += total
        if self._greatest is not None and greatest is not None:
            self._greatest = np.maximum(self._greatest, greatest)  # keeps NaN

    def finish(self, submit: Submit) -> dict[str, NDArray[np.float32]]:
        """Gives the fields of a `Site` that were wanted, as float32."""
        found: dict[str, NDArray[np.float32]] = {}
        if self._gram is not None:
            found["hessian"] = self._gram.finish(self.tokens, submit)
        if self._sum is not None:
            found["mean_abs"] = (self._sum / self.tokens).astype(np.float32)
        if self._greatest is not None:
            found["max_abs"] = self._greatest
        return found


def finite(found: dict[str, NDArray[np.float32]]) -> bool:
    """Whether the inputs behind statistics were finite: a NaN or an infinity in a column reaches the column's own."""
    return all(bool(np.isfinite(part.diagonal() if part.ndim == 2 else part).all()) for part in found.values())
