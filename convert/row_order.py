"""Rows in another order than a file has them, or some of them, without reading whole tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantpress.convert.checkpoint import Array, LazyTensor

__all__ = ["IN_PLACE", "ReadRows", "RowOrder", "Transposed"]

ReadRows = Callable[[int, int], Array]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """A permutation of rows that keeps blocks of rows together, or a choice of such blocks.

    Attributes:
        block: rows in a block; 1 where nothing moves.
        blocks: block b of the result is block `blocks[b]` of what is read; empty: blocks stay in place.
        within: row r of a block is row `within[r]` of the block that is read; empty: rows of a block stay in place.
    """

    block: int = 1
    blocks: tuple[int, ...] = ()
    within: tuple[int, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether any row changes its place."""
        return bool(self.blocks or self.within)

    def inverse(self) -> RowOrder:
        """Gives the order that undoes this one."""
        return RowOrder(self.block, _inverse(self.blocks), _inverse(self.within))

    def read(self, read_rows: ReadRows, start: int, stop: int) -> Array:
        """Gives rows `[start, stop)` of the result, reading whole blocks and as few calls as the blocks allow.

        Args:
            read_rows: gives rows of the tensor whose rows are to be reordered.
            start: first row; reading is cheapest at multiples of `block`.
            stop: row after the last one.
        """
        if not self.moves:
            return read_rows(start, stop)
        first, last = start // self.block, -(-stop // self.block)
        rows = self._read_blocks(read_rows, first, last)
        if self.within:
            shaped = rows.reshape(last - first, self.block, *rows.shape[1:])
            rows = np.take(shaped, self.within, axis=1).reshape(rows.shape)
        skip = start - first * self.block
        return rows[skip : skip + stop - start]

    def _read_blocks(self, read_rows: ReadRows, first: int, last: int) -> Array:
        size = self.block
        if not self.blocks:
            return read_rows(first * size, last * size)
        wanted = self.blocks[first:last]
        runs = _runs(wanted)
        if size == 1 and len(runs) > 1:  # single rows, such as every other one: one read of all between
            low, high = min(wanted), max(wanted) + 1
            return np.take(read_rows(low, high), np.asarray(wanted) - low, axis=0)
        parts = [read_rows(low * size, high * size) for low, high in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Gives the runs `[low, high)` of numbers that follow one another."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(place) for place in np.argsort(order))


IN_PLACE = RowOrder()


@dataclass
class Transposed:
    """Rows of the transpose of a tensor, which has to be read whole; it is read once and let go with this object."""

    tensor: LazyTensor
    _whole: Array | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read_rows(self, start: int, stop: int) -> Array:
        """Gives rows `[start, stop)` of the transpose: columns of the tensor, C-contiguous."""
        with self._lock:
            if self._whole is None:
                self._whole = self.tensor.exact_rows(0, self.tensor.rows)
        return np.ascontiguousarray(self._whole[:, start:stop].T)
